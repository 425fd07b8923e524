// Calls of the CUDA runtime in the programs beside it: one that fails says so and ends the program.
#pragma once

#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>

#define CHECK(call)                                                                  \
  do {                                                                               \
    const cudaError_t status = (call);                                               \
    if (status != cudaSuccess) {                                                     \
      std::fprintf(stderr, "%s: %s\n", #call, cudaGetErrorString(status));           \
      std::exit(1);                                                                  \
    }                                                                                \
  } while (0)
