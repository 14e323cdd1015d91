/* The sums of outer_products.h of bfloat16, which the processor multiplies in pairs.
 *
 * A word holds two elements of bfloat16, of the ranks 2j and 2j + 1: those of h, rounded to
 * bfloat16, or of a column of B. Past the last rank they are zero. Each sum is one of float32, over
 * j in order.
 */
#ifndef MULTILORA_WORD_PRODUCTS_H
#define MULTILORA_WORD_PRODUCTS_H

#include "outer_products.h"

#if defined(__AVX512BF16__)

INLINE u32v words_at(const void *base, int64_t index) {
    u32v words;
    memcpy(&words, (const uint32_t *)base + index, sizeof words);
    return words;
}

INLINE f32v add_products(f32v sums, uint32_t h, u32v b) {
    u32v both = h - (u32v){0};
    return (f32v)_mm512_dpbf16_ps((__m512)sums, (__m512bh)both, (__m512bh)b);
}

/* Words of a row of h: its first `rank` elements. */
INLINE void words_of_h(uint32_t *words, const void *h, int64_t start, int64_t rank, int dtype) {
    uint16_t *out = (uint16_t *)words;
    int64_t j = 0;
    for (; j + LANES <= rank; j += LANES) store(out, j, load(h, start + j, dtype), BF16);
    if (j < rank) store(out, j, load_part(h, start + j, rank - j, dtype), BF16);
}

/* The first n elements at index, zeros after them; reads nothing past them. */
INLINE u32v load_columns(const void *b, int64_t index, int64_t n) {
    const uint16_t *from = (const uint16_t *)b + index;
    if (n >= PAIR) return words_at(from, 0);
    return (u32v)_mm512_maskz_loadu_epi16((1u << n) - 1, from);
}

/* Words of PAIR columns, from the elements of two ranks. */
INLINE void interleave(u32v words[2], u32v even, u32v odd) {
    const __m512i first = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40,
                                           8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(LANES));
    words[0] = (u32v)_mm512_permutex2var_epi16((__m512i)even, first, (__m512i)odd);
    words[1] = (u32v)_mm512_permutex2var_epi16((__m512i)even, second, (__m512i)odd);
}

/* Words of `cols` columns of B whose columns are contiguous, of the ranks j and, if there is one,
 * j + 1. */
INLINE void words_of_ranks(u32v words[2], const void *b, int64_t at, int64_t ldb, int64_t cols,
                           int odd) {
    interleave(words, load_columns(b, at, cols), odd ? load_columns(b, at + ldb, cols) : (u32v){0});
}

/* words[j][0..NB): of `cols` columns of B, by the strides of its rows (its outputs) and columns. */
static void words_of_columns(uint32_t *words, const void *b, int64_t start, int64_t row_stride,
                             int64_t col_stride, int64_t cols, int64_t rank) {
    for (int64_t j = 0; j < rank; j += 2, words += NB) {
        int odd = j + 1 < rank;
        if (row_stride == 1) {
            for (int64_t c = 0; c < cols; c += PAIR) {
                int64_t at = start + j * col_stride + c;
                UNROLL for (int i = 0; i < 2; i++) /* the next columns, which are far from these */
                    __builtin_prefetch((const uint16_t *)b + at + i * col_stride + NB);
                words_of_ranks((u32v *)(words + c), b, at, col_stride, min64(PAIR, cols - c), odd);
            }
        } else {
            memset(words, 0, NB * sizeof *words);
            for (int64_t c = 0; c < cols; c++)
                copy_elements(words + c, b, start + j + c * row_stride, 1 + odd, BF16);
        }
    }
}

/* ROWS x VECS vectors of y: their first `cols` columns, against rank rows of B's words. */
INLINE void word_block(const int rows, const uint32_t *h, int64_t ldh, const uint32_t *words,
                       int64_t rank, void *const *y, int64_t col, int64_t cols, struct onto onto) {
    f32v acc[6][VECS];
    UNROLL for (int m = 0; m < rows; m++) {
        fetch_columns(y[m], col + NB, NB, BF16);
        UNROLL for (int n = 0; n < VECS; n++) acc[m][n] = (f32v){0};
    }
    for (int64_t j = 0; 2 * j < rank; j++) {
        u32v b[VECS];
        UNROLL for (int n = 0; n < VECS; n++) b[n] = words_at(words, j * NB + n * LANES);
        UNROLL for (int m = 0; m < rows; m++)
            UNROLL for (int n = 0; n < VECS; n++)
                acc[m][n] = add_products(acc[m][n], h[m * ldh + j], b[n]);
    }
    UNROLL for (int m = 0; m < rows; m++) {
        if (!y[m]) continue;
        UNROLL for (int n = 0; n < VECS; n += 2)
            if (n * LANES < cols)
                put_columns(y[m], col + n * LANES, cols - n * LANES, acc[m][n], acc[m][n + 1],
                            onto_column(onto, n * LANES), BF16, 0);
    }
}

/* All rows of a tile against NB columns. */
static NOINLINE void word_columns(const uint32_t *h, int64_t ldh, int64_t rows,
                                  const uint32_t *words, int64_t rank, void *const *y, int64_t col,
                                  int64_t cols, struct onto onto) {
    int64_t m = 0;
    for (; m + 6 <= rows; m += 6)
        word_block(6, h + m * ldh, ldh, words, rank, y + m, col, cols, onto);
    for (; m + 2 <= rows; m += 2)
        word_block(2, h + m * ldh, ldh, words, rank, y + m, col, cols, onto);
    if (m < rows) word_block(1, h + m * ldh, ldh, words, rank, y + m, col, cols, onto);
}

/* A few rows against contiguous columns of B: as stream_typed, two columns at a time. */
INLINE void stream_rows(const int rows, const uint32_t *h, int64_t ldh, const void *b,
                        int64_t b_start, int64_t ldb, int64_t rank, void *const *y, int64_t col,
                        int64_t cols, struct onto onto, struct reading reading) {
    _Alignas(CACHE_LINE) float sums[STREAMED_ROWS][SUMS_APART];
    for (int m = 0; m < rows; m++)
        memset(sums[m], 0, (size_t)round_up(cols, PAIR) * sizeof sums[m][0]);
    int64_t ahead = columns_ahead(cols, ldb, sizeof(uint16_t));
    for (int64_t j = 0; j < rank; j += 2) {
        int64_t at = b_start + j * ldb;
        for (int64_t c = 0; c < cols; c += PAIR) {
            u32v words[2];
            words_of_ranks(words, b, at + c, ldb, min64(PAIR, cols - c), j + 1 < rank);
            UNROLL for (int i = 0; i < 2; i++)
                fetch((const char *)((const uint16_t *)b + at + c + i * ldb + ahead), CACHE_LINE,
                      reading);
            UNROLL for (int half = 0; half < 2; half++) {
                UNROLL for (int m = 0; m < rows; m++) {
                    float *sum = sums[m] + c + half * LANES;
                    f32v before = load(sum, 0, F32);
                    store(sum, 0, add_products(before, h[m * ldh + j / 2], words[half]), F32);
                }
            }
        }
    }
    for (int m = 0; m < rows; m++)
        for (int64_t c = 0; y[m] && c < cols; c += PAIR)
            put_columns(y[m], col + c, cols - c, load(sums[m], c, F32),
                        load(sums[m], c + LANES, F32), onto_column(onto, c), BF16, 0);
}

static NOINLINE void stream_words(const uint32_t *h, int64_t ldh, int64_t rows, const void *b,
                                  int64_t b_start, int64_t ldb, int64_t rank, void *const *y,
                                  int64_t col, int64_t cols, struct onto onto,
                                  struct reading reading) {
    if (rows == 1)
        stream_rows(1, h, ldh, b, b_start, ldb, rank, y, col, cols, onto, reading);
    else
        stream_rows(2, h, ldh, b, b_start, ldb, rank, y, col, cols, onto, reading);
}

#endif
#endif
