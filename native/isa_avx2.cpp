#include "simd/avx2.h"

#include "isa.inc"
