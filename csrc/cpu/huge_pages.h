#pragma once

#include <cstdint>

namespace cpo {

// Asks the kernel to back [address, address + bytes) with huge pages, where it offers them. Faulting in a fresh buffer of logits
// in 4 KiB pages costs several per cent of the GEMM that fills it. A hint: nothing depends on the answer.
void advise_huge_pages(std::uintptr_t address, std::int64_t bytes);

}  // namespace cpo
