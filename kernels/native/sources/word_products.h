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

#define STREAMED_WORD_ROWS 32 /* up to which the order in which B lies in memory is faster */
#define STREAMED_SUMS 4096    /* of all rows: what stays in the first-level cache */
#define PAIRS_AT_ONCE 4 /* of many rows, whose sums are read and written for each */
#define ONE_PAIR_ROWS 4 /* up to which it is one: reading B takes the time, and has fewer streams */

/* Words of a row of h: its first `rank` elements. */
INLINE void words_of_h(uint32_t *words, const void *h, int64_t start, int64_t rank, int dtype) {
    uint16_t *out = (uint16_t *)words;
    int64_t j = 0;
    for (; j + LANES <= rank; j += LANES) store(out, j, load(h, start + j, dtype), BF16);
    if (j < rank) store(out, j, load_part(h, start + j, rank - j, dtype), BF16);
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
    interleave(words, first_words(b, at, cols), odd ? first_words(b, at + ldb, cols) : (u32v){0});
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
                acc[m][n] = add_products(acc[m][n], in_all_lanes(h[m * ldh + j]), b[n]);
    }
    put_block(rows, VECS, acc, y, col, cols, onto, BF16, 0);
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

/* Some rows against contiguous columns of B. */
struct stream {
    const uint32_t *h; /* words; a row's begin ldh after those of the row before */
    int64_t ldh;
    const void *b; /* rank j begins at b_start + j * ldb */
    int64_t b_start, ldb, rank;
    void *const *y;
    int64_t col, cols; /* the first column in y, and how many there are */
    struct onto onto;
    struct fetching *fetching;
};

/* How many columns so many rows can have sums of. */
INLINE int64_t streamed_columns(int64_t rows) {
    return min64(STREAMED_COLUMNS, STREAMED_SUMS / rows / NB * NB);
}

/* Adds products of some pairs of ranks with PAIR columns to a row's sums of these; the first products
 * are the sums. */
INLINE void add_pairs(float *sums, const u32v *h, u32v words[][2], const int pairs, int first) {
    f32v low = {0}, high = {0};
    if (!first) low = load(sums, 0, F32), high = load(sums, LANES, F32);
    UNROLL for (int i = 0; i < pairs; i++) {
        low = add_products(low, h[i], words[i][0]);
        high = add_products(high, h[i], words[i][1]);
    }
    store(sums, 0, low, F32);
    store(sums, LANES, high, F32);
}

/* Some pairs of ranks, from j on, of all columns. */
struct pairs {
    const uint16_t *b; /* the next column's first rank */
    int64_t ldb, ldh, ldsums;
    const uint32_t *h;
    float *sums;
    int first, odd;
    u32v kept[2]; /* of h, if there are few rows, which meet one pair at a time */
};

INLINE void stream_step(struct pairs *p, const int few, int64_t rows, const int pairs,
                        int64_t cols, struct fetching *fetching) {
    u32v words[PAIRS_AT_ONCE][2];
    UNROLL for (int i = 0; i < pairs; i++)
        words_of_ranks(words[i], p->b, 2 * i * p->ldb, p->ldb, cols, p->odd);
    fetch(fetching, 2 * pairs * CACHE_LINE);
    UNROLL for (int m = 0; m < few; m++)
        add_pairs(p->sums + m * p->ldsums, &p->kept[m], words, pairs, p->first);
    for (int64_t m = few; m < rows; m++) {
        u32v h[PAIRS_AT_ONCE];
        UNROLL for (int i = 0; i < pairs; i++) h[i] = in_all_lanes(p->h[m * p->ldh + i]);
        add_pairs(p->sums + m * p->ldsums, h, words, pairs, p->first);
    }
    p->b += PAIR, p->sums += PAIR;
}

/* few: how many rows there are, if that is known when this is compiled; else 0. */
INLINE void stream_pairs_of(const struct stream *s, const int few, int64_t rows, const int pairs,
                            int64_t j, float *sums) {
    struct pairs p = {
        .b = (const uint16_t *)s->b + s->b_start + j * s->ldb,
        .ldb = s->ldb,
        .ldh = s->ldh,
        .ldsums = s->cols + SUMS_BETWEEN,
        .h = s->h + j / 2,
        .sums = sums,
        .first = j == 0,
        .odd = pairs > 1 || j + 1 < s->rank,
    };
    UNROLL for (int m = 0; m < few; m++) p.kept[m] = in_all_lanes(p.h[m * p.ldh]);
    int64_t c = 0;
    for (; c + PAIR <= s->cols; c += PAIR) stream_step(&p, few, rows, pairs, PAIR, s->fetching);
    if (c < s->cols) stream_step(&p, few, rows, pairs, s->cols - c, s->fetching);
}

/* A function of its own for each, since all in one would run out of registers. */
#define STREAM(NAME, FEW, PAIRS)                                                                   \
    static NOINLINE void NAME(const struct stream *s, int64_t rows, int64_t j, float *sums) {      \
        stream_pairs_of(s, FEW, FEW ? FEW : rows, PAIRS, j, sums);                                 \
    }
STREAM(stream_pair_1, 1, 1)
STREAM(stream_pair_2, 2, 1)
STREAM(stream_pair, 0, 1)
STREAM(stream_pairs, 0, PAIRS_AT_ONCE)

/* As stream_typed, one pair of ranks or some side by side. There is at least one rank, and there are
 * at most streamed_columns(rows) columns. */
static void stream_words(const struct stream *s, int64_t rows) {
    _Alignas(CACHE_LINE) float sums[STREAMED_SUMS + STREAMED_WORD_ROWS * SUMS_BETWEEN];
    int64_t j = 0;
    if (rows > ONE_PAIR_ROWS)
        for (; j + 2 * PAIRS_AT_ONCE <= s->rank; j += 2 * PAIRS_AT_ONCE)
            stream_pairs(s, rows, j, sums);
    for (; j < s->rank; j += 2) {
        if (rows == 1) stream_pair_1(s, rows, j, sums);
        else if (rows == 2) stream_pair_2(s, rows, j, sums);
        else stream_pair(s, rows, j, sums);
    }
    for (int64_t m = 0; m < rows; m++)
        put_sums(sums + m * (s->cols + SUMS_BETWEEN), s->y[m], s->col, s->cols, s->onto, BF16, 0);
}

#endif
#endif
