// Projections on a GPU: reference.py has the maths.
#pragma once
#include "tile_backward.cuh"
