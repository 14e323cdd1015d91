/* What Python and the C code agree on: functions, structs and numbers; the structs' sizes are
 * compared when a library is loaded. No Python or torch headers: addresses are passed.
 */
#ifndef MULTILORA_ABI_H
#define MULTILORA_ABI_H

#include <stdint.h>

/* Types of elements. */
enum dtype { F32 = 0, BF16 = 1, F16 = 2 };

/* ---- segment_gemm.c, called by segment_gemm.py ---- */

#define MAX_SLICES 16

/* The plan buffer's header, and the length of a tile's record: see plan.py. */
enum { PLAN_TOKENS = 0, PLAN_ROWS = 1, PLAN_RUNS = 2, PLAN_TILES = 3, TILE_INTS = 4 };

enum mode { MODE_LINEAR = 0, MODE_SHRINK = 1, MODE_EXPAND = 2 };

struct slice {
    int64_t a, a_slot_stride, a_row_stride;               /* address; strides in elements */
    int64_t b, b_slot_stride, b_row_stride, b_col_stride; /* one of the last two is 1 */
    int64_t cols;   /* output columns N_i */
    int64_t offset; /* first of them, from y_offset on */
};

struct lora_call {
    /* What a layer's weights fix once. */
    int64_t mode, slices, k, max_rank, weight_dtype, longest_tile;
    int64_t ranks, ranks_stride, ranks_slot_stride; /* int32 [slices, slots] */
    int64_t overwrite;           /* 1: y = delta instead of y += delta, for every row */
    int64_t factors, factors_stride; /* float32 [slots, all columns]; 0: there are none */
    int64_t marks, marks_stride;     /* int32 [slices, slots]: whose factors count */
    int64_t bias;                    /* float32 [all columns]: not multiplied; 0: there is none */
    double scale;
    /* What differs from one batch to the next ... */
    int64_t x, y, h; /* h: for the shrink and expand halves */
    /* ... and what is often the same. */
    int64_t threads, scratch;
    int64_t tokens; /* rows of x (or h) and y; plan entries at or past it are skipped */
    int64_t x_row_stride, x_dtype;
    int64_t y_row_stride, y_dtype, y_offset;
    int64_t h_slice_stride, h_row_stride, h_dtype;
    int64_t plan, order;
    int64_t tile_slot, tile_start, tile_rows; /* the fields of the first tile */
    struct slice slice[MAX_SLICES];
};
extern const int64_t multilora_call_bytes;

/* float32 values of scratch memory that a call on so many threads needs, whatever its batch. */
int64_t multilora_scratch_floats(const struct lora_call *call, int64_t threads);
void multilora_run(const struct lora_call *call);

/* ---- packed_linear.c, called by packed_linear.py ---- */

#define MAX_PACKED_ROWS 64

struct packed_call {
    int64_t weight, bias; /* addresses; bias 0: there is none */
    int64_t columns, k;   /* outputs, whole blocks of them, and inputs, whole words */
    int64_t dtype;        /* of all: F32 or BF16 */
    int64_t x, y;         /* addresses of [rows, k] and [rows, columns] */
    int64_t rows;         /* at most MAX_PACKED_ROWS */
    int64_t x_row_stride, y_row_stride; /* in elements */
    int64_t threads;
};
extern const int64_t multilora_packed_call_bytes;

/* Columns of a block of weights of this type, 0 if they cannot be multiplied here. */
int64_t multilora_packed_columns(int64_t dtype);
void multilora_packed_linear(const struct packed_call *call);

/* ---- scatter.c, called by scatter.py ---- */

/* PIECE in pieces.py. All in bytes. */
struct scatter_piece {
    int64_t from; /* address of the first row of the source, in which they follow each other */
    int64_t to;   /* address of the first row in the slot */
    int64_t rows, row_bytes;
    int64_t stride; /* from row to row in the slot */
};
extern const int64_t multilora_scatter_piece_bytes;

void multilora_scatter(const struct scatter_piece *pieces, int64_t count);

/* ---- pack.c, called by packing.py ---- */

enum kind {
    CONVERT = 0,   /* store [rows, columns] */
    TRANSPOSE = 1, /* store [columns, rows] */
    RAW = 2,       /* store the bytes as they are; judge what they would be in a slot */
};

/* PIECE in packing.py. */
struct pack_piece {
    int64_t from;          /* of the first element, in bytes from the span's beginning */
    int64_t from_stride;   /* from row to row, in elements */
    int64_t from_dtype;
    int64_t rows, columns;
    int64_t to;            /* address of the first element; 0: only judged */
    int64_t to_stride;     /* from row to row as they are stored, in elements */
    int64_t to_dtype;      /* of the slots */
    int64_t kind;
    double scale;          /* rounded to float32 */
};
extern const int64_t multilora_pack_piece_bytes;

/* Leaves each piece's largest magnitude, as float32 has it without a sign, in `largest`. */
void multilora_pack(const char *span, const struct pack_piece *pieces, int64_t count,
                    uint32_t *largest);

#endif
