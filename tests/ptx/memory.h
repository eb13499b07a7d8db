// Checked access to memory of every space.
#pragma once

#include <algorithm>
#include <cstdio>
#include <type_traits>

#include "values.h"

namespace ptx {

// The address on the host, or null after a report: out of bounds, misaligned, or null. Accesses are also shown to the
// detector of races. `written` is what a plain write is to leave.
char* memory_at(Thread& thread, const Instruction& in, const Operand& operand, uint32_t bytes, Access access,
                const void* written);

}  // namespace ptx
