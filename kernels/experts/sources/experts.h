/* What Python and experts.c agree on, as abi.h is for the other C code. */
#ifndef MULTILORA_EXPERTS_H
#define MULTILORA_EXPERTS_H

#include <stdint.h>

/* How weights lie in memory: see experts.c. */
enum packing { F32_SINGLE = 0, BF16_SINGLE = 1, BF16_WORDS = 2 };

/* Fields of a segment: rows that follow each other and belong to one expert. */
enum { SEGMENT_EXPERT = 0, SEGMENT_START = 1, SEGMENT_ROWS = 2, SEGMENT_INTS = 3 };

struct experts_call {
    int64_t weight, packing; /* address of [experts, columns, k], packed */
    int64_t bias;            /* float32 [experts, columns]; 0: there is none */
    int64_t columns, k;      /* whole blocks of outputs, and inputs; whole words of these */
    int64_t x, x_row_stride; /* [rows, k], of the type that multilora_experts_x says */
    int64_t y, y_row_stride; /* float32 [rows, columns]; strides in elements */
    int64_t segments, segment_count;
    int64_t threads;
};
extern const int64_t multilora_experts_call_bytes;

/* The type that x has for weights of a packing: an `enum dtype`. */
int64_t multilora_experts_x(int64_t packing);
void multilora_experts(const struct experts_call *call);

struct experts_sum_call {
    int64_t y, y_row_stride; /* float32 [pairs, width] */
    int64_t places, weights; /* int32 and float32 [tokens, top_k]: rows of y, and their factors */
    int64_t rows;            /* int32 [tokens]: rows of out */
    int64_t tokens, top_k, width;
    int64_t out, out_row_stride, out_dtype;
    int64_t threads;
};
extern const int64_t multilora_experts_sum_call_bytes;

void multilora_experts_sum(const struct experts_sum_call *call);

#endif
