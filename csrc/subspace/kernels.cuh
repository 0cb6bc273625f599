// Projections on a GPU: reference.py has the maths.
#pragma once
#include "dense.cuh"
#include "fastfood.cuh"
#include "tile_backward.cuh"
