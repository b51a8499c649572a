#include "simd/neon.h"

#include "isa.inc"
