#include "simd/scalar.h"

#include "isa.inc"
