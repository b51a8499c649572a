#include "shoal/dispatch.h"

#include <atomic>

#include "shoal/cpu.h"

namespace shoal {

namespace scalar {
extern const Ops table;
}
namespace avx2 {
extern const Ops table;
}
namespace avx512 {
extern const Ops table;
}
namespace neon {
extern const Ops table;
}

namespace {

struct Candidate {
    const Ops* table;
    bool (*supported)();
};

constexpr Candidate kBestFirst[] = {
#ifdef SHOAL_HAVE_AVX512
    {&avx512::table, cpu_has_avx512},
#endif
#ifdef SHOAL_HAVE_AVX2
    {&avx2::table, cpu_has_avx2},
#endif
#ifdef SHOAL_HAVE_NEON
    {&neon::table, cpu_has_neon},
#endif
    {&scalar::table, cpu_has_scalar},
};

std::atomic<const Ops*> selected{nullptr};

}  // namespace

std::vector<const Ops*> available_isas() {
    std::vector<const Ops*> tables;
    for (const Candidate& candidate : kBestFirst) {
        if (candidate.supported()) {
            tables.push_back(candidate.table);
        }
    }
    return tables;
}

const Ops& ops() {
    const Ops* table = selected.load(std::memory_order_acquire);
    if (table == nullptr) {  // two threads may both come here and find the same answer
        table = available_isas().front();
        selected.store(table, std::memory_order_release);
    }
    return *table;
}

bool select_isa(std::string_view name) {
    for (const Ops* table : available_isas()) {
        if (name == table->isa) {
            selected.store(table, std::memory_order_release);
            return true;
        }
    }
    return false;
}

}  // namespace shoal
