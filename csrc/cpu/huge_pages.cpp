#include "cpu/huge_pages.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace cpo {

void advise_huge_pages([[maybe_unused]] std::uintptr_t address, [[maybe_unused]] std::int64_t bytes) {
#if defined(__linux__)
  constexpr std::uintptr_t kHugePage = std::uintptr_t{2} << 20;
  // Only pages that lie wholly inside: the rest of the first and last may be somebody else's.
  const std::uintptr_t begin = (address + kHugePage - 1) / kHugePage * kHugePage;
  const std::uintptr_t end = (address + static_cast<std::uintptr_t>(bytes)) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace cpo
