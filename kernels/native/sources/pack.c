/* Packs parts of a checkpoint: values of a span of its bytes, converted, to where they belong.
 *
 * Values are widened to float32, multiplied by the piece's scale and rounded once (to nearest, ties
 * to even); this is what the slots will hold. The largest magnitude among them comes out beside
 * the values: read as an integer without its sign bit, a float's magnitude grows with the number,
 * and infinity and NaN are the largest of all.
 *
 * A span stays in the cache between reading, hashing and this. Results are put together in a tile
 * on the stack and leave it by whole cache lines.
 */
#include "streaming.h"
#include "vectors.h"

const int64_t multilora_pack_piece_bytes = sizeof(struct pack_piece);

#define RUN 2048 /* elements that are converted at a time */
#define TILE 64  /* rows and columns that are transposed at a time */

typedef int32_t i32v __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint16_t u16x8u __attribute__((vector_size(16), aligned(2)));

INLINE i32v larger(i32v a, i32v b) {
    i32v mask = a > b;
    return (a & mask) | (b & ~mask);
}

/* LANES values, as the slots hold them; keeps the largest magnitude, as float32 has it for 32-bit
 * types and bfloat16 (in its upper half). */
INLINE void convert_vector(void *to, const void *from, int64_t i, f32v scale, i32v *largest,
                           const int from_dtype, const int to_dtype) {
    f32v v = load(from, i, from_dtype) * scale;
    if (to_dtype == F32) {
        memcpy((float *)to + i, &v, sizeof v);
        *largest = larger(*largest, (i32v)v & 0x7fffffff);
        return;
    }
    u16v raw;
    if (to_dtype == BF16) {
        /* Not the processor's own conversion, which makes zero of the smallest numbers. */
        u32v bits = round_to_bf16(v);
        raw = __builtin_convertvector(bits >> 16, u16v);
        *largest = larger(*largest, (i32v)bits & 0x7fff0000);
    } else {
        store(&raw, 0, v, F16);
        *largest = larger(*largest, (i32v)(__builtin_convertvector(raw, u32v) & 0x7fff));
    }
    memcpy((uint16_t *)to + i, &raw, sizeof raw);
}

/* n values that follow each other. */
INLINE void convert_run(void *to, const void *from, int64_t n, f32v scale, i32v *largest,
                        const int from_dtype, const int to_dtype) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        convert_vector(to, from, i, scale, largest, from_dtype, to_dtype);
    if (i < n) {
        uint32_t in[LANES], out[LANES];
        for (int64_t j = 0; j < LANES; j++) /* filled up with what is there anyway */
            copy_elements((char *)in + (size_t)j * width_of(from_dtype), from,
                          i + (j < n - i ? j : 0), 1, from_dtype);
        convert_vector(out, in, 0, scale, largest, from_dtype, to_dtype);
        copy_elements((char *)to + (size_t)i * width_of(to_dtype), out, 0, n - i, to_dtype);
    }
}

typedef void run_function(void *, const void *, int64_t, float, uint32_t *);

INLINE uint32_t largest_of(i32v v, int dtype) {
    int32_t most = 0;
    for (int i = 0; i < LANES; i++) most = v[i] > most ? v[i] : most;
    return dtype == BF16 ? (uint32_t)most >> 16 : (uint32_t)most;
}

#define RUN_FUNCTION(FROM, TO)                                                                     \
    static NOINLINE void run_##FROM##_##TO(void *to, const void *from, int64_t n, float scale,     \
                                           uint32_t *largest) {                                    \
        i32v most = {0};                                                                           \
        convert_run(to, from, n, broadcast(scale), &most, FROM, TO);                               \
        uint32_t here = largest_of(most, TO);                                                      \
        if (here > *largest) *largest = here;                                                      \
    }
RUN_FUNCTION(F32, F32) RUN_FUNCTION(F32, BF16) RUN_FUNCTION(F32, F16)
RUN_FUNCTION(BF16, F32) RUN_FUNCTION(BF16, BF16) RUN_FUNCTION(BF16, F16)
RUN_FUNCTION(F16, F32) RUN_FUNCTION(F16, BF16) RUN_FUNCTION(F16, F16)

static run_function *const run_functions[3][3] = {{run_F32_F32, run_F32_BF16, run_F32_F16},
                                                  {run_BF16_F32, run_BF16_BF16, run_BF16_F16},
                                                  {run_F16_F32, run_F16_BF16, run_F16_F16}};

/* Bytes from a tile to where they stay. */
static void put(char *to, const char *from, size_t bytes) {
    if (((uintptr_t)to & (LINE - 1)) == 0)
        for (; bytes >= LINE; to += LINE, from += LINE, bytes -= LINE) stream_line(to, from);
    memcpy(to, from, bytes);
}

/* How many elements an address lies past a line's beginning: by so many the first tile is shorter,
 * and all others begin with a line. */
INLINE int64_t past_line(const char *to, size_t width) {
    return (int64_t)(((uintptr_t)to & (LINE - 1)) / width);
}

static void pack_rows(const struct pack_piece *p, const char *span, run_function *run,
                      uint32_t *largest) {
    uint32_t tile[RUN] __attribute__((aligned(LINE)));
    size_t from_width = width_of((int)p->from_dtype), to_width = width_of((int)p->to_dtype);
    int64_t rows = p->rows, columns = p->columns, from_stride = p->from_stride;
    int64_t to_stride = p->to ? p->to_stride : columns;
    if (from_stride == columns && to_stride == columns) /* one long row */
        columns *= rows, rows = 1;
    for (int64_t row = 0; row < rows; row++) {
        const char *from = span + p->from + (size_t)(row * from_stride) * from_width;
        char *to = (char *)p->to + (size_t)(row * to_stride) * to_width;
        int64_t n = min64(RUN - past_line(to, to_width), columns);
        for (int64_t i = 0; i < columns; i += n, n = min64(RUN, columns - i)) {
            run(tile, from + (size_t)i * from_width, n, (float)p->scale, largest);
            if (p->to) put(to + (size_t)i * to_width, (const char *)tile, (size_t)n * to_width);
        }
    }
}

/* [rows, columns] of 16 bits, by blocks of 8 x 8 that lie in registers; the last ones may reach
 * past the rows and columns. */
static void transpose16(uint16_t (*restrict to)[TILE], const uint16_t *restrict from,
                        int64_t stride, int64_t rows, int64_t columns) {
    for (int64_t j = 0; j < columns; j += 8)
        for (int64_t i = 0; i < rows; i += 8) {
            u16x8u a[8], b[8];
            UNROLL for (int k = 0; k < 8; k++) memcpy(&a[k], from + (i + k) * stride + j, 16);
            UNROLL for (int k = 0; k < 4; k++) { /* rows k and k + 4, three times over */
                b[2 * k] = SHUF(a[k], a[k + 4], 0, 8, 1, 9, 2, 10, 3, 11);
                b[2 * k + 1] = SHUF(a[k], a[k + 4], 4, 12, 5, 13, 6, 14, 7, 15);
            }
            UNROLL for (int k = 0; k < 4; k++) {
                a[2 * k] = SHUF(b[k], b[k + 4], 0, 8, 1, 9, 2, 10, 3, 11);
                a[2 * k + 1] = SHUF(b[k], b[k + 4], 4, 12, 5, 13, 6, 14, 7, 15);
            }
            UNROLL for (int k = 0; k < 4; k++) {
                b[2 * k] = SHUF(a[k], a[k + 4], 0, 8, 1, 9, 2, 10, 3, 11);
                b[2 * k + 1] = SHUF(a[k], a[k + 4], 4, 12, 5, 13, 6, 14, 7, 15);
            }
            UNROLL for (int k = 0; k < 8; k++) memcpy(&to[j + k][i], &b[k], 16);
        }
}

static void transpose32(uint32_t (*restrict to)[TILE], const uint32_t *restrict from,
                        int64_t stride, int64_t rows, int64_t columns) {
    for (int64_t j = 0; j < columns; j++)
        for (int64_t i = 0; i < rows; i++) to[j][i] = from[i * stride + j];
}

static void pack_transposed(const struct pack_piece *p, const char *span, run_function *run,
                            uint32_t *largest) {
    uint32_t values[TILE * TILE] __attribute__((aligned(LINE)));
    uint32_t turned[TILE * TILE] __attribute__((aligned(LINE)));
    size_t from_width = width_of((int)p->from_dtype), to_width = width_of((int)p->to_dtype);
    /* Whole rows of a narrow matrix, as those of a B of low rank, are one long one. */
    int is_narrow = p->columns <= TILE && p->from_stride == p->columns;
    int64_t stride = is_narrow ? p->columns : TILE;
    int64_t rows = min64(TILE - past_line((char *)p->to, to_width), p->rows);
    for (int64_t row = 0; row < p->rows; row += rows, rows = min64(TILE, p->rows - row)) {
        for (int64_t column = 0; column < p->columns; column += TILE) {
            int64_t columns = min64(TILE, p->columns - column);
            const char *from =
                span + p->from + (size_t)(row * p->from_stride + column) * from_width;
            if (is_narrow)
                run(values, from, rows * columns, (float)p->scale, largest);
            else
                for (int64_t i = 0; i < rows; i++)
                    run((char *)values + (size_t)(i * TILE) * to_width,
                        from + (size_t)(i * p->from_stride) * from_width, columns, (float)p->scale,
                        largest);
            if (to_width == 2)
                transpose16((uint16_t(*)[TILE])turned, (const uint16_t *)values, stride, rows,
                            columns);
            else
                transpose32((uint32_t(*)[TILE])turned, values, stride, rows, columns);
            for (int64_t j = 0; j < columns; j++)
                put((char *)p->to + (size_t)((column + j) * p->to_stride + row) * to_width,
                    (const char *)turned + (size_t)(j * TILE) * to_width, (size_t)rows * to_width);
        }
    }
}

static void copy_raw(const struct pack_piece *p, const char *span) {
    size_t width = width_of((int)p->from_dtype), bytes = (size_t)p->columns * width;
    for (int64_t row = 0; row < p->rows; row++)
        memcpy((char *)p->to + (size_t)(row * p->to_stride) * width,
               span + p->from + (size_t)(row * p->from_stride) * width, bytes);
}

/* Packs `count` pieces of a span; `largest` gets the largest magnitude of each, as the bits of
 * its `to_dtype` without the sign. */
void multilora_pack(const char *span, const struct pack_piece *pieces, int64_t count,
                    uint32_t *largest) {
    for (int64_t i = 0; i < count; i++) {
        const struct pack_piece *p = &pieces[i];
        run_function *run = run_functions[p->from_dtype][p->to_dtype];
        largest[i] = 0;
        if (p->kind == TRANSPOSE && p->to) {
            pack_transposed(p, span, run, &largest[i]);
        } else if (p->kind == RAW && p->to) {
            struct pack_piece judged = *p;
            judged.to = 0;
            copy_raw(p, span);
            pack_rows(&judged, span, run, &largest[i]);
        } else {
            pack_rows(p, span, run, &largest[i]);
        }
    }
    stream_end();
}
