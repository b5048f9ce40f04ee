// SPDX-License-Identifier: Apache-2.0
#pragma once

// A function for CPU and CUDA alike.
#ifdef __CUDACC__
#define KVEVICT_HD __host__ __device__
#else
#define KVEVICT_HD
#endif
