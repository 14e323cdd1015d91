/* Reads matrices from a file into one buffer: parts of them, in another type, scaled, transposed.
 *
 * Each block is read with pread straight to where it belongs if its bytes are wanted as they are,
 * else through a scratch that stays in the cache: the page cache is read once and the buffer
 * written once. Threads take block after block.
 *
 * Values are widened to float32, multiplied, and rounded once to the buffer's type (to nearest,
 * ties to even, as PyTorch rounds).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>

#if defined(_OPENMP)
int omp_get_thread_num(void);
#define THREAD_INDEX omp_get_thread_num()
#else
#define THREAD_INDEX 0
#endif

enum dtype { F32 = 0, BF16 = 1, F16 = 2 };

/* Rows that are transposed at a time: a whole cache line of the narrowest type, twice. */
#define TILE_ROWS 64
#define TILE_COLUMNS 16

/* Mirrored by BLOCK in kernels/blocks.py. */
struct block {
    int64_t file_offset;  /* of the first element wanted, in bytes */
    int64_t file_columns; /* of the matrix in the file */
    int64_t dtype;        /* of the matrix in the file */
    int64_t rows, columns; /* wanted */
    int64_t target;       /* first element in the buffer */
    int64_t transposed;   /* 1: stored [columns, rows] */
    double scale;
};

static size_t width_of(int64_t dtype) { return dtype == F32 ? 4 : 2; }

static inline float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint16_t to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (uint16_t)rounded;
}

/* to[i] = scale * from[i], as float32. */
static void widen(float *restrict to, const void *restrict from, int64_t n, int64_t dtype,
                  float scale) {
    const uint16_t *half = from;
    if (dtype == F32)
        for (int64_t i = 0; i < n; i++) to[i] = ((const float *)from)[i] * scale;
    else if (dtype == BF16)
        for (int64_t i = 0; i < n; i++) to[i] = from_bits((uint32_t)half[i] << 16) * scale;
    else
        for (int64_t i = 0; i < n; i++) to[i] = (float)((const _Float16 *)from)[i] * scale;
}

/* to[i] = from[i * step], rounded. */
static inline void narrow(void *restrict to, const float *restrict from, int64_t n, int64_t step,
                          int64_t dtype) {
    if (dtype == F32)
        for (int64_t i = 0; i < n; i++) ((float *)to)[i] = from[i * step];
    else if (dtype == BF16)
        for (int64_t i = 0; i < n; i++) ((uint16_t *)to)[i] = to_bf16(from[i * step]);
    else
        for (int64_t i = 0; i < n; i++) ((_Float16 *)to)[i] = (_Float16)from[i * step];
}

static void convert(char *to, const char *from, int64_t n, int64_t from_dtype, int64_t to_dtype,
                    float scale) {
    float tile[TILE_ROWS * TILE_COLUMNS];
    for (int64_t i = 0; i < n; i += TILE_ROWS * TILE_COLUMNS) {
        int64_t count = n - i < TILE_ROWS * TILE_COLUMNS ? n - i : TILE_ROWS * TILE_COLUMNS;
        widen(tile, from + (size_t)i * width_of(from_dtype), count, from_dtype, scale);
        narrow(to + (size_t)i * width_of(to_dtype), tile, count, 1, to_dtype);
    }
}

/* Rows of a matrix [rows, columns] -> columns of one whose rows are `stride` elements apart. */
static void convert_transposed(char *to, int64_t stride, const char *from, int64_t rows,
                               int64_t columns, int64_t from_dtype, int64_t to_dtype, float scale) {
    float tile[TILE_ROWS * TILE_COLUMNS];
    size_t from_width = width_of(from_dtype), to_width = width_of(to_dtype);
    for (int64_t first = 0; first < columns; first += TILE_COLUMNS) {
        int64_t wide = columns - first < TILE_COLUMNS ? columns - first : TILE_COLUMNS;
        for (int64_t row = 0; row < rows; row += TILE_ROWS) {
            int64_t tall = rows - row < TILE_ROWS ? rows - row : TILE_ROWS;
            for (int64_t i = 0; i < tall; i++)
                widen(tile + i * TILE_COLUMNS,
                      from + (size_t)((row + i) * columns + first) * from_width, wide, from_dtype,
                      scale);
            for (int64_t j = 0; j < wide; j++)
                narrow(to + (size_t)((first + j) * stride + row) * to_width, tile + j, tall,
                       TILE_COLUMNS, to_dtype);
        }
    }
}

/* 0, the errno of a failure, or -1 where the file ends too early. */
static int read_fully(int file, char *to, size_t bytes, int64_t offset) {
    while (bytes) {
        ssize_t count = pread(file, to, bytes, offset);
        if (count < 0 && errno == EINTR) continue;
        if (count < 0) return errno;
        if (count == 0) return -1;
        to += count, offset += count, bytes -= (size_t)count;
    }
    return 0;
}

static int read_block(int file, const struct block *b, char *buffer, int64_t dtype, char *scratch,
                      int64_t scratch_bytes) {
    size_t from_width = width_of(b->dtype), to_width = width_of(dtype);
    int transposed = b->transposed && b->rows > 1 && b->columns > 1;
    int as_it_is = b->dtype == dtype && b->scale == 1.0 && !transposed;
    /* Rows that are one span in the file; a part of each row is read row by row. */
    int64_t chunk = b->columns < b->file_columns ? 1 : b->rows;
    if (!as_it_is) {
        int64_t fit = scratch_bytes / (int64_t)((size_t)b->columns * from_width);
        if (chunk > fit) chunk = fit > TILE_ROWS ? fit / TILE_ROWS * TILE_ROWS : fit;
    }
    for (int64_t row = 0; row < b->rows; row += chunk) {
        int64_t rows = b->rows - row < chunk ? b->rows - row : chunk;
        int64_t at = b->target + (transposed ? row : row * b->columns);
        char *to = buffer + (size_t)at * to_width;
        int failure = read_fully(file, as_it_is ? to : scratch,
                                 (size_t)(rows * b->columns) * from_width,
                                 b->file_offset + row * b->file_columns * (int64_t)from_width);
        if (failure) return failure;
        if (as_it_is) continue;
        if (transposed)
            convert_transposed(to, b->rows, scratch, rows, b->columns, b->dtype, dtype,
                               (float)b->scale);
        else
            convert(to, scratch, rows * b->columns, b->dtype, dtype, (float)b->scale);
    }
    return 0;
}

/* Reads `count` blocks into a buffer of `dtype`. Each thread has `scratch_bytes` of scratch, enough
 * for any block's row. Returns 0, or -1 or an errno and the index of a block that failed. */
int64_t multilora_read_blocks(int64_t file, const struct block *blocks, int64_t count,
                              char *buffer, int64_t dtype, char *scratch, int64_t scratch_bytes,
                              int64_t threads, int64_t *failed) {
    int64_t result = 0, next = 0;
#pragma omp parallel num_threads((int)threads)
    {
        char *own = scratch + THREAD_INDEX * scratch_bytes;
        while (!__atomic_load_n(&result, __ATOMIC_RELAXED)) {
            int64_t i = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED), none = 0;
            if (i >= count) break;
            if (!blocks[i].rows || !blocks[i].columns) continue;
            int64_t failure = read_block((int)file, &blocks[i], buffer, dtype, own, scratch_bytes);
            if (failure && __atomic_compare_exchange_n(&result, &none, failure, 0,
                                                       __ATOMIC_RELAXED, __ATOMIC_RELAXED))
                *failed = i;
        }
    }
    return result;
}
