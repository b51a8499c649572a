// The choice of instruction set: made once when the library loads, changed only by select_isa.
#pragma once

#include <string_view>
#include <vector>

#include "shoal/ops.h"

namespace shoal {

// Tables that this build holds and this machine can run, best first; the last is always scalar.
std::vector<const Ops*> available_isas();

// The table in force. Fetch it once per unit of work, not per row.
const Ops& ops();

// Puts the named table in force for every thread. False, and no change, if this machine or build does not have it.
bool select_isa(std::string_view name);

}  // namespace shoal
