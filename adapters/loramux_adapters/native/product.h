/* What y = x W^T is asked with, however it is multiplied. */
#ifndef LORAMUX_PRODUCT_H
#define LORAMUX_PRODUCT_H

#include "common.h"

#define BLOCK 64 /* inputs with one scale, which `in` is a multiple of */

struct Product {
    const void *weight;  /* NF4 codes or bf16, each in its file's layout */
    const float *scales; /* NULL: the weight is bf16 */
    const float *codes;  /* the 16 values of NF4 */
    const bf16 *bias;    /* [out], or NULL */
    const bf16 *x;       /* [rows, in], contiguous */
    bf16 *y;             /* [rows, out], contiguous */
    long rows, in, out;
    int failed; /* 1: there was no memory */
};

#endif
