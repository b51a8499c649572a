#include "simd/avx512.h"

#include "isa.inc"
