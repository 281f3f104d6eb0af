// Kernels for the tests of the emulator and of common.cuh.
#include "common.cuh"

// ---- common.cuh ----

template <typename T>
__device__ void widen(const T* source, float* target, i64 count) {
    for (i64 i = threadIdx.x; i < count; i += blockDim.x) {
        store(target, i, load(source, i));
    }
}

template <typename T>
__device__ void narrow(const float* source, T* target, i64 count) {
    for (i64 i = threadIdx.x; i < count; i += blockDim.x) {
        store(target, i, source[i]);
    }
}

// Adds one, 16 bytes a thread.
template <typename T>
__device__ void increment(const T* source, T* target) {
    const i64 at = static_cast<i64>(threadIdx.x) * LANES<T>;
    float values[LANES<T>];
    load_16_bytes(source + at, values);
    for (int i = 0; i < LANES<T>; ++i) {
        values[i] += 1.0f;
    }
    store_16_bytes(target + at, values);
}

#define FOR_TYPE(T, name) \
    extern "C" __global__ void widen_##name(const T* source, float* target, i64 count) { \
        widen(source, target, count); \
    } \
    extern "C" __global__ void narrow_##name(const float* source, T* target, i64 count) { \
        narrow(source, target, count); \
    } \
    extern "C" __global__ void increment_##name(const T* source, T* target) { \
        increment(source, target); \
    }
FOR_TYPE(float, f32)
FOR_TYPE(bf16, bf16)
FOR_TYPE(f16, f16)

extern "C" __global__ void reductions(const float* x, float* sums, float* maxima, float* warp_sums) {
    const float value = x[threadIdx.x];
    warp_sums[threadIdx.x] = warp_sum(value);
    sums[threadIdx.x] = block_sum(value);
    maxima[threadIdx.x] = block_max(value);
}

// ---- barriers, shared memory ----

// Running sums of a block's values, in log2(block) rounds.
extern "C" __global__ void scan(const int* x, int* sums) {
    extern __shared__ int values[];
    const int i = threadIdx.x;
    values[i] = x[blockIdx.x * blockDim.x + i];
    for (int distance = 1; distance < static_cast<int>(blockDim.x); distance *= 2) {
        __syncthreads();
        const int left = i >= distance ? values[i - distance] : 0;
        __syncthreads();
        values[i] += left;
    }
    sums[blockIdx.x * blockDim.x + i] = values[i];
}

// Its reader does not wait for the writer.
extern "C" __global__ void lacks_barrier(const int* x, int* reversed) {
    __shared__ int values[256];
    values[threadIdx.x] = x[threadIdx.x];
    reversed[threadIdx.x] = values[blockDim.x - 1 - threadIdx.x];
}

extern "C" __global__ void static_and_dynamic(int* out) {
    __shared__ int fixed[32];
    extern __shared__ __align__(16) unsigned char bytes[];
    fixed[threadIdx.x] = threadIdx.x;
    bytes[threadIdx.x] = static_cast<unsigned char>(100 + threadIdx.x);
    __syncthreads();
    out[threadIdx.x] = fixed[31 - threadIdx.x] * 1000 + bytes[31 - threadIdx.x];
}

extern "C" __global__ void overruns(int at) {
    extern __shared__ unsigned char bytes[];
    bytes[at] = 1;
}

extern "C" __global__ void reads_dynamic(float* out) {
    extern __shared__ float values[];
    out[threadIdx.x] = values[threadIdx.x];
}

// Threads from `live` on return before the barrier.
extern "C" __global__ void counts(int live, int* out) {
    const int i = threadIdx.x;
    if (i >= live) {
        return;
    }
    out[3 * i] = __syncthreads_count(i % 3 == 0);
    out[3 * i + 1] = __syncthreads_or(i == live);
    out[3 * i + 2] = __syncthreads_and(i < live);
}

// ---- warps ----

extern "C" __global__ void shuffles(int* out) {
    const int i = threadIdx.x;
    out[i] = __shfl_xor_sync(ALL_LANES, i, 5);
    out[32 + i] = __shfl_up_sync(ALL_LANES, i, 3);
    out[64 + i] = __shfl_down_sync(ALL_LANES, i, 3, 8);
    out[96 + i] = __shfl_sync(ALL_LANES, i, 2, 8);
    const double wide = __shfl_sync(ALL_LANES, 1.0 / (i + 1), 6);
    out[128 + i] = wide == 1.0 / 7;
}

extern "C" __global__ void votes(u32* out) {
    const int i = threadIdx.x;
    out[i] = __ballot_sync(ALL_LANES, i % 4 == 1);
    out[32 + i] = __any_sync(ALL_LANES, i == 40);
    out[64 + i] = __all_sync(ALL_LANES, i < 32);
    if (i < 8) {
        out[96 + i] = __ballot_sync(0xffu, i > 5);  // the other lanes go on
    }
    __syncwarp();
}

// ---- what hangs, or is undefined ----

extern "C" __global__ void barrier_in_branch() {
    if (threadIdx.x < 16) {
        __syncthreads();
    }
    __syncwarp();
}

extern "C" __global__ void two_barriers() {
    if (threadIdx.x < 32) {
        __syncthreads();
    } else {
        __syncthreads();
    }
}

extern "C" __global__ void shuffle_after_return(float* out) {
    if (threadIdx.x == 7) {
        return;
    }
    out[threadIdx.x] = __shfl_xor_sync(ALL_LANES, 1.0f, 1);
}

extern "C" __global__ void foreign_mask() {
    __syncwarp(1u);
}

extern "C" __global__ void shuffle_outside_mask(int* out) {
    if (threadIdx.x < 4) {
        out[threadIdx.x] = __shfl_sync(0xfu, 1, 9);
    }
}

extern "C" __global__ void traps(int at) {
    if (threadIdx.x == at) {
        __trap();
    }
}

// ---- atomics, launches ----

extern "C" __global__ void histogram(const int* x, i64 count, u32* bins, float* sum, int* highest, u32* bits) {
    const i64 i = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < count) {
        atomicAdd(&bins[x[i]], 1u);
        atomicAdd(sum, 0.5f);
        atomicMax(highest, x[i]);
        atomicOr(bits, 1u << x[i]);
    }
}

extern "C" __global__ void __launch_bounds__(2 * WARP, 1) bounded(int* out) {
    out[threadIdx.x] = 1;
}

extern "C" __global__ void places(int* out) {
    const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    out[block * blockDim.x * blockDim.y * blockDim.z + thread] = 100 * block + thread;
}

extern "C" __global__ void typed(i64 a, float b, u8 c, double d, double* out) {
    out[0] = static_cast<double>(a) + b + c + d;
}

// One rounding after the product and one after the sum, unless the compiler contracts them.
extern "C" __global__ void rounds_twice(float a, float b, float c, float* out) {
    out[0] = a * b + c;
    out[1] = __fadd_rn(__fmul_rn(a, b), c);
    out[2] = fmaf(a, b, c);
}

extern "C" __global__ void stores(int* at) {
    if (threadIdx.x == 3) {
        *at = 1;
    }
}

// 0: a vector at an address that no device reads it from; 1: behind a shared array; 2: too far a shift;
// 3: a sum that does not fit.
extern "C" __global__ void undefined(int what, int* out) {
    __shared__ int values[8];
    if (what == 0) {
        *out = reinterpret_cast<const uint2*>(out + 1)->y;
    } else if (what == 1) {
        values[threadIdx.x] = 1;
        *out = values[threadIdx.x];
    } else if (what == 2) {
        *out = 1 << (what + 30);
    } else {
        *out = out[1] + 0x7fffffff;
    }
}

__device__ __noinline__ int recurse(int depth) {
    volatile char local[1000];
    local[depth % 1000] = 1;
    return depth == 0 ? 0 : recurse(depth - 1) + local[depth % 1000];
}

extern "C" __global__ void overflows(int* out) {
    *out = recurse(1000);
}

extern "C" __global__ void deep(int* out) {
    volatile int local[4096];
    for (int i = 0; i < 4096; ++i) {
        local[i] = i + threadIdx.x;
    }
    __syncthreads();
    out[threadIdx.x] = local[4095];
}
