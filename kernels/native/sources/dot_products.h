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
        u32v w[RANK_STEP];
        UNROLL for (int n = 0; n < ranks; n++)
            w[n] = words_at((const uint16_t *)a + a_at + n * lda, 0);
        UNROLL for (int m = 0; m < rows; m++) {
            u32v v = words_at((const uint16_t *)x + x_at + m * ldx, 0);
            UNROLL for (int n = 0; n < ranks; n++)
                acc[m][n] = (f32v)_mm512_dpbf16_ps((__m512)acc[m][n], (__m512bh)v, (__m512bh)w[n]);
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

/* Some rows of x against some rows of A. */
struct dots {
    const void *x;
    int64_t ldx;
    const void *a;
    int64_t a_start, lda, k, ranks;
    struct fetching *fetching; /* NULL: A has been read for other rows, and is in a cache */
    float scale;
    float *h;
    int64_t ldh;
};

INLINE void dot_block(const int rows, const int ranks, const struct dots *d, int64_t rank,
                      const int x_dtype, const int dtype) {
    const size_t width = width_of(dtype);
    const int part = ranks * PAIR * (int)width;
    int64_t a_start = d->a_start + rank * d->lda, i = 0;
    f32v acc[TALL_ROWS][RANK_STEP];
    UNROLL for (int m = 0; m < rows; m++)
        UNROLL for (int n = 0; n < ranks; n++) acc[m][n] = (f32v){0};
    for (; i + PAIR <= d->k; i += PAIR) {
        if (d->fetching) fetch(d->fetching, part);
        dot_pair(rows, ranks, acc, d->x, i, d->ldx, d->a, a_start + i, d->lda, x_dtype, dtype);
    }
    if (i < d->k) {
        u32v end[2 * RANK_STEP] = {0};
        UNROLL for (int n = 0; n < ranks; n++) {
#if defined(__AVX512BF16__)
            if (x_dtype == BF16) { /* a call would need the registers */
                end[n] = first_words(d->a, a_start + n * d->lda + i, d->k - i);
                continue;
            }
#endif
            copy_elements((char *)end + (size_t)(n * PAIR) * width, d->a, a_start + n * d->lda + i,
                          d->k - i, dtype);
        }
        dot_pair(rows, ranks, acc, d->x, i, d->ldx, end, 0, PAIR, x_dtype, dtype);
    }
    UNROLL for (int m = 0; m < rows; m++) {
        float *h = d->h + m * d->ldh + rank;
        if (ranks == 4)
            sum_lanes4(h, acc[m], d->scale);
        else
            UNROLL for (int n = 0; n < ranks; n++) h[n] = d->scale * sum_lanes(acc[m][n]);
    }
}

INLINE void dot_rows(const int rows, const struct dots *d, const int x_dtype, const int dtype) {
    const int step = rows > 2 ? RANK_STEP : 2; /* reading A takes the time */
    int64_t n = 0;
    for (; n + step <= d->ranks; n += step) dot_block(rows, step, d, n, x_dtype, dtype);
    for (; n < d->ranks; n++) dot_block(rows, 1, d, n, x_dtype, dtype);
}

/* A function of its own for each number of rows, since all in one would run out of registers. */
#define DOTS(NAME, ROWS, X_DTYPE, A_DTYPE)                                                         \
    static NOINLINE void NAME##_##X_DTYPE##_##A_DTYPE(const struct dots *given) {                  \
        const struct dots d = *given; /* nobody else's: what is stored cannot change it */         \
        dot_rows(ROWS, &d, X_DTYPE, A_DTYPE);                                                      \
    }
#define SHRINK(X_DTYPE, A_DTYPE)                                                                   \
    DOTS(tall_dots, TALL_ROWS, X_DTYPE, A_DTYPE)                                                   \
    DOTS(four_dots, 4, X_DTYPE, A_DTYPE)                                                           \
    DOTS(two_dots, 2, X_DTYPE, A_DTYPE)                                                            \
    DOTS(one_dots, 1, X_DTYPE, A_DTYPE)                                                            \
    static void shrink_##X_DTYPE##_##A_DTYPE(struct dots d, int64_t rows) {                        \
        while (rows > 0) {                                                                         \
            int64_t n = rows >= TALL_ROWS ? TALL_ROWS : rows >= 4 ? 4 : rows >= 2 ? 2 : 1;         \
            if (n == TALL_ROWS) tall_dots_##X_DTYPE##_##A_DTYPE(&d);                               \
            else if (n == 4) four_dots_##X_DTYPE##_##A_DTYPE(&d);                                  \
            else if (n == 2) two_dots_##X_DTYPE##_##A_DTYPE(&d);                                   \
            else one_dots_##X_DTYPE##_##A_DTYPE(&d);                                               \
            d.x = (const char *)d.x + (size_t)(n * d.ldx) * width_of(X_DTYPE);                     \
            d.h += n * d.ldh, d.fetching = NULL, rows -= n;                                        \
        }                                                                                          \
    }
SHRINK(F32, F32)
SHRINK(F32, BF16)
SHRINK(F32, F16)
#if defined(__AVX512BF16__)
SHRINK(BF16, BF16)
#endif

typedef void shrink_function(struct dots, int64_t);
static shrink_function *const shrink_rows[3] = {shrink_F32_F32, shrink_F32_BF16, shrink_F32_F16};

#endif
