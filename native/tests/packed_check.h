#pragma once
#include <vector>

#include "shoal/ops.h"

namespace shoal::tests {

struct PackedCase {
    const char* name;
    bool (*run)(const Ops& ops, const Ops& scalar);  // says on stderr where they differ
};

const std::vector<PackedCase>& packed_cases();

}  // namespace shoal::tests
