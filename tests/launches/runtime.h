// A runtime that does nothing but keep errors as CUDA's does.
#pragma once

#include <cuda_runtime_api.h>

extern cudaError_t kept;  // what cudaGetLastError returns next
extern cudaError_t next;  // what the next launch returns
extern unsigned launched_blocks;
