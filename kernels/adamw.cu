// AdamW with moments of 8 or 32 bits: bit-identical to src/optim/adamw8bit.rs and src/optim/adamw.rs. A warp
// has one block of 256 elements, a lane 8 consecutive ones: a lane's codes are 8 bytes, and the largest
// magnitudes go from lane to lane without shared memory. Per f32 element, 8-bit moments move 16 bytes, f32
// moments 28.
#include "common.cuh"

constexpr int THREADS = 256;
constexpr int BLOCK = 256;
constexpr int EACH = BLOCK / WARP;

/// What is the same for all elements of a parameter; see `Rule` in src/optim/adamw.rs.
struct Rule {
    float beta1, beta2, eps, step_size, keep;
    i64 seed;  // of stochastic rounding, for bf16; negative: round to nearest
};

// ---- the 8-bit format, see src/optim/octave.rs ----

constexpr float SIGNED_TOP = 2068480.0f;  // 505 * 2^12
constexpr float ROOT_TOP = 16662528.0f;   // 1017 * 2^14
constexpr float LEAST = 1e-30f;
constexpr u32 SIGNED_ZERO = 128;
constexpr u32 SIGN = 0x80000000u;

__device__ __forceinline__ float inverse(float top, float absmax) {
    return absmax > LEAST ? __fdiv_rn(top, absmax) : 0.0f;
}

/// The code of the value nearest to `y >= 0`, as a float.
__device__ __forceinline__ float code_of(float y) {
    const u32 octave = (__float_as_uint(y) >> 23) - 127u;
    const u32 third = (octave * 171u) >> 9;
    const float power = __uint_as_float((third + 127u) << 23);
    const float inverse_square = __uint_as_float((127u - 2u * third) << 23);
    const float linear = fmaf(y, inverse_square, 6.0f * power) * (1.0f / 7.0f);
    return linear < y ? linear : y;
}

__device__ __forceinline__ u32 nearest(float q, u32 zero) {
    return __float_as_uint(q + (12582912.0f + static_cast<float>(zero))) & 0xffu;
}

__device__ __forceinline__ float value_of(float q) {
    const float power = __uint_as_float(__float_as_uint(q) & 0xff800000u);
    return fmaf(q, 7.0f, -6.0f * power) * (power * power);
}

__device__ __forceinline__ u32 signed_code(float x, float inverse) {
    const float q = code_of(fabsf(x) * inverse);
    return nearest(__uint_as_float(__float_as_uint(q) | (__float_as_uint(x) & SIGN)), SIGNED_ZERO);
}

__device__ __forceinline__ u32 root_code(float root, float inverse) {
    return nearest(code_of(root * inverse), 0);
}

__device__ __forceinline__ float signed_value(u32 code) {
    const float q = static_cast<float>(static_cast<int>(code) - static_cast<int>(SIGNED_ZERO));
    return value_of(q) * (1.0f / SIGNED_TOP);
}

__device__ __forceinline__ float root_value(u32 code) {
    return value_of(static_cast<float>(code)) * (1.0f / ROOT_TOP);
}

// ---- the rule ----

struct Element {
    float value, m, v, root;
    bool finite;
};

__device__ __forceinline__ Element updated(const Rule& rule, float value, float grad, float m, float v) {
    const float square = grad * grad;
    const bool finite = square < __uint_as_float(0x7f800000u);  // false for NaN
    m = finite ? fmaf(rule.beta1, m, (1.0f - rule.beta1) * grad) : 0.0f;
    v = finite ? fmaf(rule.beta2, v, (1.0f - rule.beta2) * square) : 0.0f;
    const float root = __fsqrt_rn(v);
    const float keep = finite ? rule.keep : 1.0f;
    value = fmaf(rule.step_size, __fdiv_rn(m, root + rule.eps), value) * keep;
    return Element{value, m, v, root, finite};
}

/// Stochastic rounding to bf16: the upper neighbour with the probability that keeps the mean.
__device__ __forceinline__ float nudged(float x, u32 place, u32 seed) {
    u32 noise = place ^ seed;
    noise = (noise ^ (noise >> 16)) * 0x85ebca6bu;
    noise = (noise ^ (noise >> 13)) * 0xc2b2ae35u;
    noise = (noise ^ (noise >> 16)) & 0xffffu;
    const bool finite = fabsf(x) < __uint_as_float(0x7f800000u);
    return finite ? __uint_as_float((__float_as_uint(x) + noise) & 0xffff0000u) : x;
}

// ---- a lane's elements ----

/// In the last block some lanes have fewer than 8 elements; the rest is filled with values without effect.
template <typename T>
__device__ __forceinline__ void read(const T* source, int here, bool aligned, float (&values)[EACH]) {
    if (here == EACH && aligned) {
        constexpr int GROUP = LANES<T>;
        float group[GROUP];
#pragma unroll
        for (int part = 0; part < EACH / GROUP; ++part) {
            load_16_bytes(source + part * GROUP, group);
#pragma unroll
            for (int i = 0; i < GROUP; ++i) {
                values[part * GROUP + i] = group[i];
            }
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        values[i] = i < here ? to_float(source[i]) : 0.0f;
    }
}

template <typename T>
__device__ __forceinline__ void write(T* target, int here, bool aligned, const float (&values)[EACH]) {
    if (here == EACH && aligned) {
        constexpr int GROUP = LANES<T>;
        float group[GROUP];
#pragma unroll
        for (int part = 0; part < EACH / GROUP; ++part) {
#pragma unroll
            for (int i = 0; i < GROUP; ++i) {
                group[i] = values[part * GROUP + i];
            }
            store_16_bytes(target + part * GROUP, group);
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        if (i < here) {
            target[i] = from_float<T>(values[i]);
        }
    }
}

__device__ __forceinline__ void read_codes(
    const u8* source, int here, bool aligned, u32 behind, u32 (&codes)[EACH]
) {
    if (here == EACH && aligned) {
        const uint2 words = *reinterpret_cast<const uint2*>(source);
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            codes[i] = ((i < 4 ? words.x : words.y) >> (8 * (i % 4))) & 0xffu;
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        codes[i] = i < here ? source[i] : behind;
    }
}

__device__ __forceinline__ void write_codes(
    u8* target, int here, bool aligned, const u32 (&codes)[EACH]
) {
    if (here == EACH && aligned) {
        uint2 words = make_uint2(0, 0);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            words.x |= codes[i] << (8 * i);
            words.y |= codes[i + 4] << (8 * i);
        }
        *reinterpret_cast<uint2*>(target) = words;
        return;
    }
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        if (i < here) {
            target[i] = static_cast<u8>(codes[i]);
        }
    }
}

/// Which elements of a parameter a lane has: none if the block starts past the end.
struct Place {
    i64 block, start;
    int here;

    __device__ __forceinline__ explicit Place(i64 count) {
        const i64 thread = static_cast<i64>(blockIdx.x) * THREADS + threadIdx.x;
        block = thread / WARP;
        start = thread * EACH;
        const i64 left = count - start;
        here = left >= EACH ? EACH : left > 0 ? static_cast<int>(left) : 0;
    }
};

template <typename T>
__device__ __forceinline__ void finish(
    T* value, const Place& place, const Rule& rule, i64 first, float (&values)[EACH], int bad, u64* bad_count
) {
    if (sizeof(T) == 2 && rule.seed >= 0) {
        const u64 from = static_cast<u64>(first);
        const i64 in_parameter = place.start / BLOCK * BLOCK;
        const u64 begin = from + static_cast<u64>(in_parameter);
        const u32 start = static_cast<u32>(begin) ^ (static_cast<u32>(begin >> 32) * 0x9e3779b9u);
        const u32 in_block = static_cast<u32>(place.start - in_parameter);
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            values[i] = nudged(values[i], start + in_block + i, static_cast<u32>(rule.seed));
        }
    }
    write(value + place.start, place.here, is_aligned_16(value), values);
    if (bad > 0) {
        atomicAdd(bad_count, static_cast<u64>(bad));
    }
}

template <typename T, typename G>
__device__ __forceinline__ void eight_bits(
    T* value, const G* grad, u8* m_codes, u8* v_codes, float* m_absmax, float* v_absmax, u64* bad_count,
    i64 count, i64 first, const Rule& rule
) {
    const Place place(count);
    if (place.block * BLOCK >= count) {
        return;  // all lanes of the warp return together
    }
    float values[EACH], grads[EACH], m[EACH], roots[EACH];
    u32 m_code[EACH], v_code[EACH];
    const bool codes_aligned = ((reinterpret_cast<u64>(m_codes) | reinterpret_cast<u64>(v_codes)) & 7u) == 0;
    read_codes(m_codes + place.start, place.here, codes_aligned, SIGNED_ZERO, m_code);
    read_codes(v_codes + place.start, place.here, codes_aligned, 0, v_code);
    read(value + place.start, place.here, is_aligned_16(value), values);
    read(grad + place.start, place.here, is_aligned_16(grad), grads);
    const float m_scale = m_absmax[place.block];
    const float root_scale = __fsqrt_rn(v_absmax[place.block]);
    u32 m_top = 0, v_top = 0;
    int bad = 0;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        const float root = root_value(v_code[i]) * root_scale;
        const Element after = updated(rule, values[i], grads[i], signed_value(m_code[i]) * m_scale, root * root);
        values[i] = after.value;
        m[i] = after.m;
        roots[i] = after.root;
        m_top = max(m_top, __float_as_uint(after.m) & ~SIGN);
        v_top = max(v_top, __float_as_uint(after.v));
        bad += after.finite ? 0 : 1;
    }
    const float m_largest = __uint_as_float(warp_max(m_top));
    const float v_largest = __uint_as_float(warp_max(v_top));
    if (threadIdx.x % WARP == 0) {
        m_absmax[place.block] = m_largest;
        v_absmax[place.block] = v_largest;
    }
    const float m_inverse = inverse(SIGNED_TOP, m_largest);
    const float root_inverse = inverse(ROOT_TOP, __fsqrt_rn(v_largest));
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        m_code[i] = signed_code(m[i], m_inverse);
        v_code[i] = root_code(roots[i], root_inverse);
    }
    write_codes(m_codes + place.start, place.here, codes_aligned, m_code);
    write_codes(v_codes + place.start, place.here, codes_aligned, v_code);
    finish(value, place, rule, first, values, bad, bad_count);
}

template <typename T, typename G>
__device__ __forceinline__ void full(
    T* value, const G* grad, float* m_values, float* v_values, u64* bad_count, i64 count, i64 first,
    const Rule& rule
) {
    const Place place(count);
    if (place.here == 0) {
        return;
    }
    float values[EACH], grads[EACH], m[EACH], v[EACH];
    const bool moments_aligned = is_aligned_16(m_values) && is_aligned_16(v_values);
    read(value + place.start, place.here, is_aligned_16(value), values);
    read(grad + place.start, place.here, is_aligned_16(grad), grads);
    read(m_values + place.start, place.here, moments_aligned, m);
    read(v_values + place.start, place.here, moments_aligned, v);
    int bad = 0;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        const Element after = updated(rule, values[i], grads[i], m[i], v[i]);
        values[i] = after.value;
        m[i] = after.m;
        v[i] = after.v;
        bad += after.finite ? 0 : 1;
    }
    write(m_values + place.start, place.here, moments_aligned, m);
    write(v_values + place.start, place.here, moments_aligned, v);
    finish(value, place, rule, first, values, bad, bad_count);
}

#define KERNELS(NAME, T, G)                                                                               \
    extern "C" __global__ void __launch_bounds__(THREADS) adamw8bit_##NAME(                               \
        T* value, const G* grad, u8* m, u8* v, float* m_absmax, float* v_absmax, u64* bad, i64 count,     \
        i64 first, float beta1, float beta2, float eps, float step_size, float keep, i64 seed             \
    ) {                                                                                                   \
        const Rule rule{beta1, beta2, eps, step_size, keep, seed};                                        \
        eight_bits<T, G>(value, grad, m, v, m_absmax, v_absmax, bad, count, first, rule);                 \
    }                                                                                                     \
    extern "C" __global__ void __launch_bounds__(THREADS) adamw_##NAME(                                   \
        T* value, const G* grad, float* m, float* v, u64* bad, i64 count, i64 first, float beta1,         \
        float beta2, float eps, float step_size, float keep, i64 seed                                     \
    ) {                                                                                                   \
        const Rule rule{beta1, beta2, eps, step_size, keep, seed};                                        \
        full<T, G>(value, grad, m, v, bad, count, first, rule);                                           \
    }

KERNELS(f32, float, float)
KERNELS(bf16, bf16, bf16)
KERNELS(f16, f16, f16)
// 16-bit values with f32 gradients.
KERNELS(bf16_f32, bf16, float)
KERNELS(f16_f32, f16, float)
