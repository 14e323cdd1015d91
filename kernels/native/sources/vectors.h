/* Vectors of float32 over float32, bfloat16 and float16 memory: 16 lanes with AVX-512, else 8.
 *
 * Plain C11 with the vector extensions that GCC and Clang share; 8 lanes are one AVX register or
 * two NEON ones. A pair of vectors holds PAIR elements that follow each other in memory. Of
 * bfloat16 a pair may be split: the even elements and the odd ones, which takes one shift and one
 * mask to widen.
 */
#ifndef MULTILORA_VECTORS_H
#define MULTILORA_VECTORS_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "abi.h"

#if defined(__F16C__) || defined(__FMA__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#define TALL_ROWS 6 /* rows x ranks of a block of dot products ... */
#define RANK_STEP 4
#define TALL_VECS 4 /* ... and vectors of y beside 6 or 4 rows: what the registers hold */
#else
#define LANES 8
#define TALL_ROWS 4
#define RANK_STEP 3
#define TALL_VECS 2
#endif
#define PAIR (2 * LANES)
#define STREAMED_ROWS 2       /* up to which B is read in the order in which it lies in memory */
#define CACHE_LINE 64
#define FETCHED_AHEAD 16384   /* bytes between what is read of weights and what is fetched */
#define FETCH_LOCALITY 3

typedef float f32v __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint32_t u32v __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint16_t u16v __attribute__((vector_size(2 * LANES), aligned(2)));
typedef float f32x4 __attribute__((vector_size(16), aligned(4)));
typedef float f32x8 __attribute__((vector_size(32), aligned(4)));
typedef uint32_t u32x8 __attribute__((vector_size(32), aligned(4)));
typedef uint16_t u16x8 __attribute__((vector_size(16), aligned(2)));

/* For loops over registers: left as loops, their arrays would lie in memory. */
#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

#define INLINE static inline __attribute__((always_inline))

/* For the function of each combination of types: in one for all, compilers run out of registers. */
#define NOINLINE __attribute__((noinline))

INLINE size_t width_of(int dtype) { return dtype == F32 ? 4 : 2; }

INLINE float f16_to_f32(uint16_t bits) {
    _Float16 half;
    memcpy(&half, &bits, 2);
    return (float)half;
}

/* Copies n elements from `index` on, as they are. */
INLINE void copy_elements(void *to, const void *from, int64_t index, int64_t n, int dtype) {
    size_t width = width_of(dtype);
    memcpy(to, (const char *)from + (size_t)index * width, (size_t)n * width);
}

INLINE f32x8 load8(const void *base, int64_t index, int dtype) {
    if (dtype == F32) {
        f32x8 v;
        memcpy(&v, (const float *)base + index, sizeof v);
        return v;
    }
    u16x8 raw;
    memcpy(&raw, (const uint16_t *)base + index, sizeof raw);
    if (dtype == BF16) return (f32x8)(__builtin_convertvector(raw, u32x8) << 16);
#if defined(__F16C__)
    return (f32x8)_mm256_cvtph_ps((__m128i)raw);
#else
    f32x8 v;
    for (int i = 0; i < 8; i++) v[i] = f16_to_f32(raw[i]);
    return v;
#endif
}

INLINE f32v load(const void *base, int64_t index, int dtype) {
#if LANES == 8
    return load8(base, index, dtype);
#else
    if (dtype == F32) {
        f32v v;
        memcpy(&v, (const float *)base + index, sizeof v);
        return v;
    }
    u16v raw;
    memcpy(&raw, (const uint16_t *)base + index, sizeof raw);
    if (dtype == BF16) return (f32v)(__builtin_convertvector(raw, u32v) << 16);
    return (f32v)_mm512_cvtph_ps((__m256i)raw);
#endif
}

/* One half of a pair: its first or second LANES elements; of bfloat16 (split) the even or odd. */
INLINE f32v load_half(const void *base, int64_t index, int half, int dtype) {
    if (dtype != BF16) return load(base, index + half * LANES, dtype);
    u32v raw;
    memcpy(&raw, (const uint16_t *)base + index, sizeof raw);
    return (f32v)(half ? raw & 0xffff0000 : raw << 16);
}

/* The first n < LANES elements at index, zeros after them; reads nothing past them. */
INLINE f32v load_part(const void *base, int64_t index, int64_t n, int dtype) {
    uint32_t buffer[LANES] = {0};
    copy_elements(buffer, base, index, n, dtype);
    return load(buffer, 0, dtype);
}

/* float32 to bfloat16 in the upper half of each word, round to nearest even; the lower half is
 * anything. NaN stays a (quiet) NaN. */
INLINE u32v round_to_bf16(f32v v) {
    u32v bits = (u32v)v;
    u32v rounded = bits + 0x7fff + ((bits >> 16) & 1);
    u32v quiet = bits | 0x400000;
#if LANES == 16
    /* Spelled out: of `v != v` GCC makes a masked load, which costs a thousand cycles while the
     * mask is empty and the page that it would read has not been touched. */
    __mmask16 nan = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
    return (u32v)_mm512_mask_mov_epi32((__m512i)rounded, nan, (__m512i)quiet);
#else
    u32v nan = (u32v)(v != v);
    return (rounded & ~nan) | (quiet & nan);
#endif
}

INLINE void store(void *base, int64_t index, f32v v, int dtype) {
    if (dtype == F32) {
        memcpy((float *)base + index, &v, sizeof v);
        return;
    }
    u16v raw;
    if (dtype == BF16) {
#if defined(__AVX512BF16__)
        raw = (u16v)_mm512_cvtneps_pbh((__m512)v);
#else
        raw = __builtin_convertvector(round_to_bf16(v) >> 16, u16v);
#endif
    } else {
#if LANES == 16
        raw = (u16v)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
        raw = (u16v)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
        for (int i = 0; i < LANES; i++) {
            _Float16 half = (_Float16)v[i];
            uint16_t bits;
            memcpy(&bits, &half, 2);
            raw[i] = bits;
        }
#endif
    }
    memcpy((uint16_t *)base + index, &raw, sizeof raw);
}

INLINE void store_part(void *base, int64_t index, int64_t n, f32v v, int dtype) {
    uint32_t buffer[LANES];
    store(buffer, 0, v, dtype);
    memcpy((char *)base + (size_t)index * width_of(dtype), buffer, (size_t)n * width_of(dtype));
}

#if defined(__AVX512BF16__)
/* PAIR elements of bfloat16 in words of two. */
INLINE u32v words_at(const void *base, int64_t index) {
    u32v words;
    memcpy(&words, (const uint32_t *)base + index, sizeof words);
    return words;
}

/* The first n elements at index, zeros after them; reads nothing past them. */
INLINE u32v first_words(const void *base, int64_t index, int64_t n) {
    const uint16_t *from = (const uint16_t *)base + index;
    if (n >= PAIR) return words_at(from, 0);
    return (u32v)_mm512_maskz_loadu_epi16((1u << n) - 1, from);
}
#endif

/* Weights that are read one run of bytes after the other, each `stride` bytes after the one before. */
struct region {
    const char *start;
    int64_t run, stride, runs;
};

#define REGIONS 16 /* known in advance */

/* The weights that will be read, in the order in which they will be: fetched as many bytes at a time
 * as others are read, which keeps them FETCHED_AHEAD bytes apart. What is read side by side is
 * fetched one run after the other. The hardware does not foresee where reading goes on after a
 * short piece. */
struct fetching {
    const char *at;       /* what is fetched next, ... */
    const char *end;      /* in the run that ends here, ... */
    struct region region; /* of this region, with the runs that are left */
    int64_t next, known;  /* the regions after it, by their numbers */
    struct region ring[REGIONS];
};

INLINE void fetch(struct fetching *f, const int bytes) {
    UNROLL for (int i = 0; i < bytes; i += CACHE_LINE)
        __builtin_prefetch(f->at + i, 0, FETCH_LOCALITY);
    f->at += bytes;
    if (f->at < f->end) return;
    if (f->region.runs > 1)
        f->region.start += f->region.stride, f->region.runs--;
    else if (f->next < f->known)
        f->region = f->ring[f->next++ % REGIONS];
    f->at = f->region.start; /* of the last one again, if there is none after it */
    f->end = f->at + f->region.run;
}

/* a * b + c. Spelled out, because compilers contract the expression in some instances of a
 * function and not in others, and then a row's bits would depend on the block it is in. */
INLINE f32v mul_add(f32v a, f32v b, f32v c) {
#if LANES == 16
    return (f32v)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (f32v)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_NEON)
    f32v out;
    for (int half = 0; half < LANES; half += 4)
        vst1q_f32((float *)&out + half,
                  vfmaq_f32(vld1q_f32((float *)&c + half), vld1q_f32((float *)&a + half),
                            vld1q_f32((float *)&b + half)));
    return out;
#else
    return a * b + c;
#endif
}

INLINE f32v broadcast(float value) { return value - (f32v){0}; }

/* A word in all lanes. */
INLINE u32v in_all_lanes(uint32_t word) { return word - (u32v){0}; }

#if defined(__AVX512BF16__)
/* sums + the products of words of two elements of bfloat16, which a lane adds up. */
INLINE f32v add_products(f32v sums, u32v a, u32v b) {
    return (f32v)_mm512_dpbf16_ps((__m512)sums, (__m512bh)a, (__m512bh)b);
}
#endif

#define SHUF(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)

/* Eight lanes to four, the first addition of every sum of lanes. */
INLINE f32x4 fold(f32v v) {
#if LANES == 16
    f32x8 w = SHUF(v, v, 0, 1, 2, 3, 4, 5, 6, 7) + SHUF(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
#else
    f32x8 w = v;
#endif
    return SHUF(w, w, 0, 1, 2, 3) + SHUF(w, w, 4, 5, 6, 7);
}

INLINE float sum_lanes(f32v v) {
    f32x4 w = fold(v);
    return (w[0] + w[2]) + (w[1] + w[3]);
}

/* out[i] = scale * sum_lanes(v[i]), for four sums at once. */
INLINE void sum_lanes4(float *out, const f32v v[4], float scale) {
    f32x4 a = fold(v[0]), b = fold(v[1]), c = fold(v[2]), d = fold(v[3]);
    f32x4 ab = SHUF(a, b, 0, 4, 1, 5) + SHUF(a, b, 2, 6, 3, 7);
    f32x4 cd = SHUF(c, d, 0, 4, 1, 5) + SHUF(c, d, 2, 6, 3, 7);
    f32x4 sums = scale * (SHUF(ab, cd, 0, 1, 4, 5) + SHUF(ab, cd, 2, 3, 6, 7));
    memcpy(out, &sums, sizeof sums);
}

/* A pair in the order of its elements -> even and odd ones, and back. */
#if LANES == 16
#define EVEN(a, b) SHUF(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30)
#define ODD(a, b) SHUF(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31)
#define FIRST(a, b) SHUF(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define SECOND(a, b) SHUF(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#else
#define EVEN(a, b) SHUF(a, b, 0, 2, 4, 6, 8, 10, 12, 14)
#define ODD(a, b) SHUF(a, b, 1, 3, 5, 7, 9, 11, 13, 15)
#define FIRST(a, b) SHUF(a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define SECOND(a, b) SHUF(a, b, 4, 12, 5, 13, 6, 14, 7, 15)
#endif

/* What a sum meets on its way into y. */
struct onto {
    int add;             /* 1: y's own value is added to it */
    const float *factor; /* then it grows by factor[column] times itself; NULL: it does not */
    const float *bias;   /* what of it does not grow; NULL: nothing */
};

INLINE struct onto onto_column(struct onto onto, int64_t column) {
    if (onto.factor) onto.factor += column;
    if (onto.bias) onto.bias += column;
    return onto;
}

/* Vectors of a pair, multiplied; split: as of put_pair. */
INLINE void multiply_pair(f32v *low, f32v *high, struct onto onto, const int split) {
    f32v a = load(onto.factor, 0, F32), b = load(onto.factor, LANES, F32);
    f32v c = {0}, d = {0};
    if (onto.bias) c = load(onto.bias, 0, F32), d = load(onto.bias, LANES, F32);
    *low = mul_add(split ? EVEN(a, b) : a, *low - (split ? EVEN(c, d) : c), *low);
    *high = mul_add(split ? ODD(a, b) : b, *high - (split ? ODD(c, d) : d), *high);
}

/* y[index..) = low, high, or += them; split: low are the even elements and high the odd ones. */
INLINE void put_pair(void *y, int64_t index, f32v low, f32v high, struct onto onto,
                     const int dtype, const int split) {
    if (split && dtype == BF16) {
        if (onto.add) {
            low += load_half(y, index, 0, BF16);
            high += load_half(y, index, 1, BF16);
        }
        if (onto.factor) multiply_pair(&low, &high, onto, 1);
#if defined(__AVX512BF16__)
        u32v both = (u32v)_mm512_permutexvar_epi16(
            _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                             6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0),
            (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
#else
        u32v both = (round_to_bf16(low) >> 16) | (round_to_bf16(high) & 0xffff0000);
#endif
        memcpy((uint16_t *)y + index, &both, sizeof both);
        return;
    }
    f32v first = split ? FIRST(low, high) : low, second = split ? SECOND(low, high) : high;
    if (onto.add) {
        first += load(y, index, dtype);
        second += load(y, index + LANES, dtype);
    }
    if (onto.factor) multiply_pair(&first, &second, onto, 0);
    store(y, index, first, dtype);
    store(y, index + LANES, second, dtype);
}

INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

/* The same for the first `cols` columns of a pair. */
INLINE void put_columns(void *y, int64_t index, int64_t cols, f32v low, f32v high,
                        struct onto onto, const int dtype, const int split) {
    if (cols >= PAIR) {
        put_pair(y, index, low, high, onto, dtype, split);
        return;
    }
    uint32_t buffer[PAIR];
    float factor[PAIR] = {0}, bias[PAIR] = {0};
    if (onto.factor) onto.factor = memcpy(factor, onto.factor, (size_t)cols * sizeof *factor);
    if (onto.bias) onto.bias = memcpy(bias, onto.bias, (size_t)cols * sizeof *bias);
    char *end = (char *)y + (size_t)index * width_of(dtype);
    memcpy(buffer, end, (size_t)cols * width_of(dtype));
    put_pair(buffer, 0, low, high, onto, dtype, split);
    memcpy(end, buffer, (size_t)cols * width_of(dtype));
}

/* ---- gather: one row of x (or h) widened to float32, zero-padded to whole pairs ---- */

INLINE void widen_pair(float *out, const void *in, int64_t at, const int dtype, const int split) {
    f32v low, high;
    if (split && dtype == BF16) {
        low = load_half(in, at, 0, dtype), high = load_half(in, at, 1, dtype);
    } else {
        f32v first = load(in, at, dtype), second = load(in, at + LANES, dtype);
        low = split ? EVEN(first, second) : first, high = split ? ODD(first, second) : second;
    }
    store(out, 0, low, F32);
    store(out, LANES, high, F32);
}

INLINE void widen_row(float *out, const void *in, int64_t start, int64_t n, const int dtype,
                      const int split) {
    int64_t i = 0;
    for (; i + PAIR <= n; i += PAIR) widen_pair(out + i, in, start + i, dtype, split);
    if (i < n) {
        uint32_t buffer[PAIR] = {0};
        copy_elements(buffer, in, start + i, n - i, dtype);
        widen_pair(out + i, buffer, 0, dtype, split);
    }
}

#define WIDEN(DTYPE) (split ? widen_row(out, in, start, n, DTYPE, 1) : widen_row(out, in, start, n, DTYPE, 0))

static void gather_row(float *out, const void *in, int64_t start, int64_t n, int dtype, int split) {
    if (dtype == F32) WIDEN(F32);
    else if (dtype == BF16) WIDEN(BF16);
    else WIDEN(F16);
}

#endif
