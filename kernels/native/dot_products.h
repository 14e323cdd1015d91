/* Blocks of dot products: h[row, :ranks] = scale * (x[row] . A[rank]), for some rows of x.
 *
 * Each is one vector of sums over K in order, whatever the block, and its lanes are added in one
 * order at the end.
 */
#ifndef MULTILORA_DOT_PRODUCTS_H
#define MULTILORA_DOT_PRODUCTS_H

#include "vectors.h"

/* acc[m][n] += x[m] . a[n], over the PAIR elements at x_at and a_at. */
INLINE void dot_pair(const int rows, const int ranks, f32v acc[TALL_ROWS][RANK_STEP], const void *x,
                     int64_t x_at, int64_t ldx, const void *a, int64_t a_at, int64_t lda,
                     const int x_dtype, const int dtype) {
#if defined(__AVX512BF16__)
    if (x_dtype == BF16) {
        __m512bh w[RANK_STEP];
        UNROLL for (int n = 0; n < ranks; n++)
            w[n] = (__m512bh)_mm512_loadu_si512((const uint16_t *)a + a_at + n * lda);
        UNROLL for (int m = 0; m < rows; m++) {
            __m512bh v = (__m512bh)_mm512_loadu_si512((const uint16_t *)x + x_at + m * ldx);
            UNROLL for (int n = 0; n < ranks; n++)
                acc[m][n] = (f32v)_mm512_dpbf16_ps((__m512)acc[m][n], v, w[n]);
        }
        return;
    }
#endif
    (void)x_dtype;
    UNROLL for (int half = 0; half < 2; half++) {
        f32v w[RANK_STEP];
        UNROLL for (int n = 0; n < ranks; n++) w[n] = load_half(a, a_at + n * lda, half, dtype);
        UNROLL for (int m = 0; m < rows; m++) {
            f32v v = load(x, x_at + m * ldx + half * LANES, F32);
            UNROLL for (int n = 0; n < ranks; n++) acc[m][n] = mul_add(v, w[n], acc[m][n]);
        }
    }
}

INLINE void dot_block(const int rows, const int ranks, const void *x, int64_t x_start, int64_t ldx,
                      const void *a, int64_t a_start, int64_t lda, int64_t k,
                      struct reading reading, float scale, float *h, int64_t ldh, const int x_dtype,
                      const int dtype) {
    const size_t width = width_of(dtype);
    const int part = ranks * PAIR * (int)width;
    const char *ahead = (const char *)a + a_start * (int64_t)width + FETCHED_AHEAD;
    f32v acc[TALL_ROWS][RANK_STEP];
    UNROLL for (int m = 0; m < rows; m++)
        UNROLL for (int n = 0; n < ranks; n++) acc[m][n] = (f32v){0};
    int64_t i = 0;
    for (; i + PAIR <= k; i += PAIR) {
        fetch(ahead, part, reading); /* in order, though some rows are read at once */
        ahead += part;
        dot_pair(rows, ranks, acc, x, x_start + i, ldx, a, a_start + i, lda, x_dtype, dtype);
    }
    if (i < k) {
        uint32_t end[RANK_STEP][PAIR] = {0};
        for (int n = 0; n < ranks; n++)
            copy_elements((char *)end + (size_t)(n * PAIR) * width, a, a_start + n * lda + i, k - i,
                          dtype);
        dot_pair(rows, ranks, acc, x, x_start + i, ldx, end, 0, PAIR, x_dtype, dtype);
    }
    UNROLL for (int m = 0; m < rows; m++) {
        if (ranks == 4)
            sum_lanes4(h + m * ldh, acc[m], scale);
        else
            UNROLL for (int n = 0; n < ranks; n++) h[m * ldh + n] = scale * sum_lanes(acc[m][n]);
    }
}

INLINE void dot_rows(const int rows, const void *x, int64_t x_start, int64_t ldx, const void *a,
                     int64_t a_start, int64_t lda, int64_t k, int64_t ranks, struct reading reading,
                     float scale, float *h, int64_t ldh, const int x_dtype, const int dtype) {
    int64_t n = 0;
    for (; n + RANK_STEP <= ranks; n += RANK_STEP)
        dot_block(rows, RANK_STEP, x, x_start, ldx, a, a_start + n * lda, lda, k, reading, scale,
                  h + n, ldh, x_dtype, dtype);
    for (; n < ranks; n++)
        dot_block(rows, 1, x, x_start, ldx, a, a_start + n * lda, lda, k, reading, scale, h + n,
                  ldh, x_dtype, dtype);
}

#define DOT_ROWS(ROWS)                                                                             \
    dot_rows(ROWS, x, m * ldx, ldx, a, a_start, lda, k, ranks, reading, scale, h + m * ldh, ldh,   \
             x_dtype, dtype)

INLINE void shrink_typed(const void *x, int64_t ldx, int64_t rows, const void *a, int64_t a_start,
                         int64_t lda, int64_t k, int64_t ranks, struct reading reading, float scale,
                         float *h, int64_t ldh, const int x_dtype, const int dtype) {
    int64_t m = 0;
    for (; m + TALL_ROWS <= rows; m += TALL_ROWS) DOT_ROWS(TALL_ROWS);
    if (m + 4 <= rows) {
        DOT_ROWS(4);
        m += 4;
    }
    if (m + 2 <= rows) {
        DOT_ROWS(2);
        m += 2;
    }
    if (m < rows) DOT_ROWS(1);
}

#define SHRINK(X_DTYPE, A_DTYPE)                                                                   \
    static NOINLINE void shrink_##X_DTYPE##_##A_DTYPE(                                             \
        const void *x, int64_t ldx, int64_t rows, const void *a, int64_t a_start, int64_t lda,     \
        int64_t k, int64_t ranks, struct reading reading, float scale, float *h, int64_t ldh) {    \
        shrink_typed(x, ldx, rows, a, a_start, lda, k, ranks, reading, scale, h, ldh, X_DTYPE,     \
                     A_DTYPE);                                                                     \
    }
SHRINK(F32, F32)
SHRINK(F32, BF16)
SHRINK(F32, F16)
SHRINK(BF16, BF16)

typedef void shrink_function(const void *, int64_t, int64_t, const void *, int64_t, int64_t,
                             int64_t, int64_t, struct reading, float, float *, int64_t);
static shrink_function *const shrink_rows[3] = {shrink_F32_F32, shrink_F32_BF16, shrink_F32_F16};

#endif
