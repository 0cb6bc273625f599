// One function for each family of kinds and direction.
#pragma once
#include "call.h"

namespace wx::sub {

void tiled_forward(const Call& call);
void tiled_backward(const Call& call);
void entrywise_forward(const Call& call);
void entrywise_backward(const Call& call);
void fastfood_forward(const Call& call);
void fastfood_backward(const Call& call);

}  // namespace wx::sub
