// The ORPO head on a tile of logits: what happens between the matrix products, which are libtorch's.
//
// A tile holds the raw products of some rows with some tokens, in float, a row every `stride` elements (a
// multiple of 8). There is one block per row; a thread reads its part of the row once, keeps it in registers
// and writes it once, so that results can overwrite the products, in the type that the next product needs.
// The reference is src/head/engine.rs; the online softmax is Milakov and Gimelshein 2018 (arXiv 1805.02867).
#include "common.cuh"

constexpr int GROUP = 8;   // consecutive columns of a thread: 16 bytes of a 16-bit type
constexpr int GROUPS = 2;  // per thread
constexpr int MAX_THREADS = 512;  // so a tile is up to 8192 wide: src/torch/head/cuda_tiles.rs
constexpr int MIN_BLOCKS = 2;     // per multiprocessor, which leaves 64 registers per thread

/// From a product to a logit: `z = scale * (product + bias)`, then
/// `softcap * tanh(z / softcap)` if `softcap` is not zero.
struct Transform {
    const float* bias;  // of the tile's columns, or null
    float scale;
    float softcap;
    float inverse;  // of the softcap, or zero

    __device__ __forceinline__ Transform(const float* bias, float scale, float softcap)
        : bias(bias), scale(scale), softcap(softcap), inverse(softcap == 0.0f ? 0.0f : 1.0f / softcap) {}

    __device__ __forceinline__ float logit(float product, int column) const {
        const float z = scale * (bias == nullptr ? product : product + bias[column]);
        return softcap == 0.0f ? z : softcap * tanhf(z * inverse);
    }
    /// `d logit / d z`.
    __device__ __forceinline__ float slope(float logit) const {
        const float ratio = logit * inverse;
        return softcap == 0.0f ? 1.0f : 1.0f - ratio * ratio;
    }
};

/// A thread's part of a row.
struct Part {
    float values[GROUPS][GROUP];

    static __device__ __forceinline__ int column(int group) {
        return (group * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) * GROUP;
    }

    /// Reads products as logits; past the last column they are `-inf`.
    __device__ __forceinline__ void read(const float* row, int columns, const Transform& transform) {
#pragma unroll
        for (int g = 0; g < GROUPS; ++g) {
            const int first = column(g);
            float low[4], high[4];
            if (first < columns) {
                load_16_bytes(row + first, low);
                load_16_bytes(row + first + 4, high);
            }
#pragma unroll
            for (int i = 0; i < GROUP; ++i) {
                const float product = i < 4 ? low[i % 4] : high[i % 4];
                values[g][i] = first + i < columns ? transform.logit(product, first + i) : Max::identity();
            }
        }
    }

    template <typename T>
    __device__ __forceinline__ void write(T* row, int columns) const {
#pragma unroll
        for (int g = 0; g < GROUPS; ++g) {
            const int first = column(g);
            if (first < columns) {
#pragma unroll
                for (int i = 0; i < GROUP; i += LANES<T>) {
                    float lanes[LANES<T>];
#pragma unroll
                    for (int lane = 0; lane < LANES<T>; ++lane) {
                        lanes[lane] = values[g][i + lane];
                    }
                    store_16_bytes(row + first + i, lanes);
                }
            }
        }
    }
};

/// Running statistics of each row's softmax.
struct Stats {
    float* max;
    double* sum;    // of exp(logit - max)
    float* label;   // logit of the target; NaN if there is none
    double* total;  // sum of the logits
};

/// Exponentials are at most one, and f16 has more range above one than below: with this factor nothing over
/// 2^-40 is lost.
template <typename T>
constexpr float HEADROOM = 1.0f;
template <>
constexpr float HEADROOM<f16> = 32768.0f;

/// Adds a tile to the statistics. With `EXPECT` the tile becomes `HEADROOM * exp(logit - max)`, times
/// the softcap's slope, and the row's accumulated sum is scaled down when its maximum moves. The shift is the
/// maximum itself, not a bound on it, and its own exponential, which is one, is counted separately: the log
/// odds of a likely token depend on the rest of the sum, down to where `1 + x` loses `x` in double.
template <typename T, bool EXPECT>
__device__ __forceinline__ void sweep(
    float* tile, i64 stride, i64 first, int columns, Transform transform, const i64* targets,
    Stats stats, float* accumulated, i64 width) {
    const i64 row = blockIdx.x;
    float* products = tile + row * stride;
    const i64 target = targets[row];
    const bool totalled = target < 0 || transform.softcap != 0.0f;
    Part part;
    part.read(products, columns, transform);
    if (threadIdx.x == 0) {
        const int column = static_cast<int>(target - first);
        if (target >= first && target < first + columns) {
            stats.label[row] = transform.logit(products[column], column);
        } else if (first == 0) {
            stats.label[row] = __uint_as_float(0x7fffffffu);
        }
    }

    float largest = Max::identity();
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
#pragma unroll
        for (int i = 0; i < GROUP; ++i) {
            largest = fmaxf(largest, part.values[g][i]);
        }
    }
    largest = block_max(largest);
    const float before = first == 0 ? Max::identity() : stats.max[row];
    const float max = fmaxf(before, largest);
    const float shrink = before == max ? 1.0f : expf(before - max);
    // fmaxf drops NaN, expf does not; if all logits are -inf, all exponentials are zero.
    const float shift = max == Max::identity() ? 0.0f : max;

    float peaks = 0.0f;
    float sum = 0.0f;
    float total = 0.0f;
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
#pragma unroll
        for (int i = 0; i < GROUP; ++i) {
            const int column = Part::column(g) + i;
            const float logit = part.values[g][i];
            const float power = expf(logit - shift);
            peaks += logit == shift ? 1.0f : 0.0f;
            sum += logit == shift ? 0.0f : power;
            total += column < columns ? logit : 0.0f;
            if (EXPECT) {
                part.values[g][i] = column < columns ? HEADROOM<T> * power * transform.slope(logit) : 0.0f;
            }
        }
    }
    if (EXPECT) {
        part.write(reinterpret_cast<T*>(products), columns);
        if (first > 0 && shrink != 1.0f) {
            float4* words = reinterpret_cast<float4*>(accumulated + row * width);
            for (i64 i = threadIdx.x; i < width / 4; i += blockDim.x) {
                const float4 word = words[i];
                words[i] =
                    make_float4(word.x * shrink, word.y * shrink, word.z * shrink, word.w * shrink);
            }
        }
    }
    sum = block_sum(sum);
    peaks = block_sum(peaks);
    if (totalled) {
        total = block_sum(total);
    }
    if (threadIdx.x == 0) {
        stats.max[row] = max;
        stats.sum[row] = (first == 0 ? 0.0 : stats.sum[row] * shrink) + peaks + sum;
        stats.total[row] = (first == 0 ? 0.0 : stats.total[row]) + total;
    }
}

/// Statistics only: without a gradient, or if the logits are computed again later.
extern "C" __global__ void __launch_bounds__(MAX_THREADS, MIN_BLOCKS) head_forward(
    float* tile, i64 stride, i64 first, int columns, const float* bias, float scale, float softcap,
    const i64* targets, float* max, double* sum, float* label, double* total) {
    sweep<float, false>(
        tile, stride, first, columns, {bias, scale, softcap}, targets, {max, sum, label, total},
        nullptr, 0);
}

#define EXPECTATION(name, T) \
    extern "C" __global__ void __launch_bounds__(MAX_THREADS, MIN_BLOCKS) name( \
        float* tile, i64 stride, i64 first, int columns, const float* bias, float scale, \
        float softcap, const i64* targets, float* max, double* sum, float* label, double* total, \
        float* accumulated, i64 width) { \
        sweep<T, true>( \
            tile, stride, first, columns, {bias, scale, softcap}, targets, \
            {max, sum, label, total}, accumulated, width); \
    }
EXPECTATION(head_expectation_f32, float)
EXPECTATION(head_expectation_bf16, bf16)
EXPECTATION(head_expectation_f16, f16)

/// The tile becomes `coefficient * scale * (softmax - onehot(target))`, times the softcap's slope:
/// the gradient with respect to the products.
template <typename T>
__device__ __forceinline__ void gradient(
    float* tile, i64 stride, i64 first, int columns, Transform transform, const i64* targets,
    const float* max, const double* sum, const float* coefficients) {
    __shared__ float shared_log;
    const i64 row = blockIdx.x;
    float* products = tile + row * stride;
    Part part;
    part.read(products, columns, transform);
    if (threadIdx.x == 0) {
        shared_log = static_cast<float>(log(sum[row]));
    }
    __syncthreads();  // also: all values that are overwritten below have been read
    const float shift = max[row];
    const float log_sum = shared_log;
    const float factor = coefficients[row] * transform.scale;
    const i64 wanted = targets[row] - first;
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
#pragma unroll
        for (int i = 0; i < GROUP; ++i) {
            const int column = Part::column(g) + i;
            const float logit = part.values[g][i];
            // Two subtractions: the first is exact for likely tokens, so no digits of the logarithm are lost.
            const float power = expf((logit - shift) - log_sum);
            const float error = column == wanted ? power - 1.0f : power;
            const bool zero = factor == 0.0f || column >= columns;
            part.values[g][i] = zero ? 0.0f : factor * error * transform.slope(logit);
        }
    }
    part.write(reinterpret_cast<T*>(products), columns);
}

#define GRADIENT(name, T) \
    extern "C" __global__ void __launch_bounds__(MAX_THREADS, MIN_BLOCKS) name( \
        float* tile, i64 stride, i64 first, int columns, const float* bias, float scale, \
        float softcap, const i64* targets, const float* max, const double* sum, \
        const float* coefficients) { \
        gradient<T>( \
            tile, stride, first, columns, {bias, scale, softcap}, targets, max, sum, coefficients); \
    }
GRADIENT(head_gradient_f32, float)
GRADIENT(head_gradient_bf16, bf16)
GRADIENT(head_gradient_f16, f16)

/// `d_hidden[index[row]] = coefficient * scale * (accumulated / sum - slope * weight[target])`, where null
/// coefficients count as ones. One block per row.
template <typename T>
__device__ __forceinline__ void finish(
    const float* accumulated, i64 stride, const T* weight, i64 width, float scale, float softcap,
    const i64* targets, const i64* index, const double* sum, const float* label,
    const float* coefficients, T* d_hidden) {
    __shared__ float shared_inverse;
    const i64 row = blockIdx.x;
    if (threadIdx.x == 0) {
        shared_inverse = static_cast<float>(1.0 / (sum[row] * HEADROOM<T>));
    }
    __syncthreads();
    const float inverse = shared_inverse;
    const float factor = (coefficients == nullptr ? 1.0f : coefficients[row]) * scale;
    // NaN if the target is outside the vocabulary: the weight has no such row.
    const float back = Transform{nullptr, scale, softcap}.slope(label[row]);
    const T* label_weight = weight + (isnan(label[row]) ? 0 : targets[row]) * width;
    const float* expected = accumulated + row * stride;
    T* out = d_hidden + index[row] * width;
    for (i64 i = threadIdx.x; i < width; i += blockDim.x) {
        const float target = isnan(label[row]) ? label[row] : back * load(label_weight, i);
        store(out, i, factor * (expected[i] * inverse - target));
    }
}

#define FINISH(name, T) \
    extern "C" __global__ void __launch_bounds__(MAX_THREADS, MIN_BLOCKS) name( \
        const float* accumulated, i64 stride, const T* weight, i64 width, float scale, \
        float softcap, const i64* targets, const i64* index, const double* sum, \
        const float* label, const float* coefficients, T* d_hidden) { \
        finish<T>( \
            accumulated, stride, weight, width, scale, softcap, targets, index, sum, label, \
            coefficients, d_hidden); \
    }
FINISH(head_finish_f32, float)
FINISH(head_finish_bf16, bf16)
FINISH(head_finish_f16, f16)

/// `rows[index[row]] *= coefficient`. One block per row.
template <typename T>
__device__ __forceinline__ void scale_rows(
    T* rows, i64 width, const i64* index, const float* coefficients) {
    T* row = rows + index[blockIdx.x] * width;
    const float factor = coefficients[blockIdx.x];
    for (i64 i = threadIdx.x; i < width; i += blockDim.x) {
        store(row, i, factor * load(row, i));
    }
}

#define SCALE_ROWS(name, T) \
    extern "C" __global__ void __launch_bounds__(MAX_THREADS, MIN_BLOCKS) name( \
        T* rows, i64 width, const i64* index, const float* coefficients) { \
        scale_rows<T>(rows, width, index, coefficients); \
    }
SCALE_ROWS(head_scale_rows_f32, float)
SCALE_ROWS(head_scale_rows_bf16, bf16)
SCALE_ROWS(head_scale_rows_f16, f16)

/// `values *= *factor`. The factor stays on the GPU; it is usually one, and then nothing is done.
template <typename T>
__device__ __forceinline__ void scale_all(T* values, i64 count, const float* factor) {
    const float by = *factor;
    if (by == 1.0f) {
        return;
    }
    const i64 groups = count / LANES<T>;
    const i64 thread = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x;
    for (i64 i = thread; i < groups; i += static_cast<i64>(gridDim.x) * blockDim.x) {
        float lanes[LANES<T>];
        load_16_bytes(values + i * LANES<T>, lanes);
#pragma unroll
        for (int lane = 0; lane < LANES<T>; ++lane) {
            lanes[lane] *= by;
        }
        store_16_bytes(values + i * LANES<T>, lanes);
    }
    const i64 rest = groups * LANES<T> + thread;
    if (rest < count) {
        store(values, rest, by * load(values, rest));
    }
}

#define SCALE(name, T) \
    extern "C" __global__ void __launch_bounds__(MAX_THREADS, MIN_BLOCKS) name( \
        T* values, i64 count, const float* factor) { \
        scale_all<T>(values, count, factor); \
    }
SCALE(head_scale_f32, float)
SCALE(head_scale_bf16, bf16)
SCALE(head_scale_f16, f16)

/// `sums += part`, a block a row: libtorch adds up a product of halves in halves, or hands it out in `float`.
extern "C" __global__ void __launch_bounds__(MAX_THREADS, MIN_BLOCKS) head_add(
    float* sums, i64 stride, const float* part, i64 width) {
    float* row = sums + blockIdx.x * stride;
    const float* added = part + blockIdx.x * width;
    for (i64 i = threadIdx.x; i < width; i += blockDim.x) {
        row[i] += added[i];
    }
}
