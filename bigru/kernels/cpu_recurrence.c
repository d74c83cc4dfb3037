// One bidirectional GRU layer on a CPU: the recurrence with its input product, and the gradients of both.
//
// The equations are those of bigru/kernels/reference.py: gates in the order r, z, n; q = W_hn h + b_hn.
// Work is cut into programs that share nothing, so that threads meet once, at a call's end: of the recurrence (block of
// sequences, direction), each holding the whole time loop; of the gradients that are products over all steps (direction,
// gate, units of it) for weights, and blocks of rows for the input. Every output element is a sum over k in an order that
// does not depend on the programs: the same bits for any number of threads.
//
// Layouts (all dense unless a stride is named; D = 2 directions, P = rows of all steps, in the order of time):
//   x (P, I), with strides x_t, x_b; dx (P, I)  y, dq, before (P, D, H)  gates (P, D, 4, H): r, z, n, q
//   gi instead of x (P, D, 3H) if !w_ih       dgi (P, D, 3H)           dy (P, D, H), with strides dy_t, dy_b
//   h0, h_n, dh_n, dh0 (D, B, H)              w_ih (3H, I), w_hh (3H, H), b_ih and b_hh (3H), b_hn (H), for each d
//   table (B + T) int64: each sequence's length, longest first, then each step's first row; without it P = T * B
// Nothing is read or computed past a sequence's end. Null where there is none or none is wanted: table, biases, gates,
// before (the state before each step), gradients that are products. b_hn, the last third of b_hh, is read only beside gi.
//
// W_hh is packed at the start of a call so that a tile reads it in order. A panel serves all rows of the block before the
// next one, so that it stays in the L1 cache.
//
// GCC or Clang. Compiled once for each instruction set and type of numbers, each a Python extension named MODULE. Without
// a MODULE it is C alone.

#define _GNU_SOURCE /* the affinity of threads */
#ifdef MODULE
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#endif
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "cpu_tiles.h"

#define BLOCK_ROWS 64  /* sequences of a program, at most */
#define CHUNK_ROWS 64  /* rows whose input product is made at once: as many steps as they hold, at least one */
#define MOST_UNITS 128 /* of a gate whose weights' gradients a program computes: so many rows of dgi fit the L2 cache */
#define INPUT_ROWS 256 /* whose gradient a program computes, at most: they repay reading W_ih */
#ifndef THREAD_WORK
#define THREAD_WORK 500000 /* multiplications that repay a thread */
#endif

// Every field is one word, so that Python passes a list of integers.
struct forward {
  const void *x, *w_ih[2], *w_hh[2], *b_ih[2], *b_hh[2], *b_hn[2], *h0;
  const int64_t *table;
  void *y, *h_n, *gates;
  intptr_t T, B, I, H, x_t, x_b;
};
struct backward {
  const void *dy, *dh_n, *y, *gates, *h0, *w_hh[2];
  const int64_t *table;
  void *dgi, *dq, *dh0, *before;
  intptr_t T, B, H, dy_t, dy_b;
};
struct products {
  const void *x, *y, *h0, *dgi, *dq, *w_ih[2];
  const int64_t *table;
  void *dx, *dw_ih[2], *dw_hh[2], *db_ih[2], *db_hh[2];
  intptr_t P, T, B, I, H, x_t, x_b;
};

// Row numbers of step t: `first` for sequence 0, `active` for how many of the sequences b0 ... b0 + rows have one.
INLINE intptr_t first_row(const int64_t *table, intptr_t B, intptr_t t) {
  return table ? (intptr_t)table[B + t] : t * B;
}
INLINE intptr_t active_rows(const int64_t *table, intptr_t b0, intptr_t rows, intptr_t t) {
  if (!table) return rows;
  while (rows > 0 && table[b0 + rows - 1] <= t) rows--;
  return rows;
}

// The next piece of a scratch buffer; with a null base only `used` grows, which tells how large a buffer must be.
static void *piece(char *base, size_t *used, size_t bytes) {
  char *at = base ? base + *used : NULL;
  *used += (bytes + LINE - 1) / LINE * LINE;
  return at;
}

#ifdef DOUBLE
#define MANTISSA 52
#define LOG2E 1.4426950408889634
#define ROUNDER 6755399441055744.0 /* 1.5 * 2^52: what is added to it is rounded to an integer */
#define HIGHEST 1024
// (2^f - 1) / f on [-1/2, 1/2], from the constant term on: minimax, relative error 3e-19.
#define POLYNOMIAL \
  {0.693147180559945309, 0.240226506959100712, 0.055504108664821627, 0.00961812910762847949, 0.00133335581464064707, \
   0.000154035303933707334, 0.0000152527338415567726, 1.32154868087055628e-6, 1.01780570877339411e-7, \
   7.05489730415549928e-9, 4.45581790833606449e-10, 2.57293241773623042e-11}
#else
#define MANTISSA 23
#define LOG2E 1.44269504f
#define ROUNDER 12582912.0f
#define HIGHEST 128
#define POLYNOMIAL \
  {0.693147188026f, 0.240226507606f, 0.0555035711422f, 0.00961808255728f, 0.00133908633647f, 0.000154531629451f} // 1e-8
#endif

// x where it lies between two bounds, else the bound; NaN stays NaN. Each loop, if not unrolled, is one instruction.
INLINE vector clamp(vector x, real low, real high) {
  _Pragma("GCC unroll 1") for (int i = 0; i < VW; i++) x[i] = low > x[i] ? low : x[i];
  _Pragma("GCC unroll 1") for (int i = 0; i < VW; i++) x[i] = high < x[i] ? high : x[i];
  return x;
}

// 2^x as s * (1 + p), s a power of two, or infinity from x = HIGHEST on; p accurate however small x is.
INLINE vector power(vector x, vector *p) {
  static const real c[] = POLYNOMIAL;
  vector shifted = x + ROUNDER, f = x - (shifted - ROUNDER), q = splat(c[sizeof c / sizeof *c - 1]);
  _Pragma("GCC unroll 16") for (int i = sizeof c / sizeof *c - 2; i >= 0; i--) q = q * f + c[i];
  *p = q * f;
  // The lowest bits of `shifted` hold the integer; ROUNDER's own are shifted out.
  return (vector)(((bits)shifted << MANTISSA) + ((bits){0} + ((integer)(HIGHEST - 1) << MANTISSA)));
}
INLINE vector sigmoid(vector x) {
  vector p, s = power(clamp(x * (real)-LOG2E, 2 - HIGHEST, HIGHEST), &p);
  return 1 / (1 + s * (1 + p));
}
INLINE vector hyperbolic(vector x) {
  vector p, s = power(clamp(x * (real)(2 * LOG2E), -2 * MANTISSA, 2 * MANTISSA), &p);
  vector e = s * p + (s - 1); // exp(2 x) - 1
  return e / (e + 2);
}

// A job: programs handed out one after another to the caller's thread and to threads made for this call. None outlives
// the call, so none spins, a fork leaves nothing behind, and calls from several Python threads need not know each other.
struct job {
  void (*program)(const struct job *job, intptr_t program, char *scratch);
  const void *call;
  intptr_t rows, parts, programs; // rows of a program, at most; parts of a gate
  size_t scratch_bytes;
  char *scratch;
  atomic_intptr_t next, threads; // the next program; threads that have begun
};

// The scratch of a forward program; `base` may be null, to learn its size.
struct forward_scratch {
  real *w_ih, *w_hh, *bias, *b_hn, *gi;
  const real **inputs, **states;
  struct panels ih, hh;
  intptr_t units, chunk; // vectors of units; steps whose input product is made at once
};
static size_t lay_out_forward(struct forward_scratch *s, const struct forward *c, intptr_t rows, char *base) {
  size_t used = 0;
  s->units = (c->H + VW - 1) / VW;
  intptr_t capacity = rows < CHUNK_ROWS ? CHUNK_ROWS : rows; // no less for more rows: the last block may have fewer
  s->chunk = capacity / rows;
  // Panels a line further apart than their size: tiles that read several at once would else meet in one cache set.
  s->hh = (struct panels){NULL, s->units, c->H * 3 * VW + LINE / sizeof(real), c->H};
  s->ih = (struct panels){NULL, s->units, c->I * 3 * VW + LINE / sizeof(real), c->I};
  s->w_hh = piece(base, &used, s->units * s->hh.stride * sizeof(real));
  s->w_ih = c->w_ih[0] ? piece(base, &used, s->units * s->ih.stride * sizeof(real)) : NULL;
  s->bias = piece(base, &used, s->units * 3 * VW * sizeof(real));
  s->b_hn = piece(base, &used, s->units * VW * sizeof(real));
  s->gi = piece(base, &used, capacity * s->units * 3 * VW * sizeof(real));
  s->inputs = piece(base, &used, capacity * sizeof(real *));
  s->states = piece(base, &used, rows * sizeof(real *));
  s->hh.w = s->w_hh, s->ih.w = s->w_ih;
  return used;
}

// gi of a tile: sums and biases, [row][unit vector][gate][VW].
static void finish_gi(void *context, intptr_t u, int S, intptr_t row, int R, const vector *sums) {
  struct forward_scratch *s = context;
  for (int r = 0; r < R; r++)
    for (int v = 0; v < 3 * S; v++)
      store(s->gi + ((row + r) * s->units + u) * 3 * VW + v * VW, *sums++ + load(s->bias + u * 3 * VW + v * VW));
}

// The new states of a tile, from W_hh h.
struct step {
  const real *gi, *b_hn;
  const real *const *h;
  real *y, *gates; // of the step's first row
  intptr_t units, H;
};
static void finish_step(void *context, intptr_t u0, int S, intptr_t row, int R, const vector *sums) {
  const struct step *c = context;
  intptr_t H = c->H;
  vector r_z[MAX_VECTORS], *of = r_z;
  const vector *sum = sums;
  // r and z of the whole tile first: the processor looks far enough ahead to compute several of them at once, but not
  // several states from their sums on.
  for (intptr_t b = row; b < row + R; b++)
    for (intptr_t u = u0; u < u0 + S; u++, sum += 3, of += 2) {
      const real *gi = c->gi + (b * c->units + u) * 3 * VW;
      of[0] = sigmoid(sum[0] + load(gi)), of[1] = sigmoid(sum[1] + load(gi + VW));
    }
  of = r_z;
  for (intptr_t b = row; b < row + R; b++)
    for (intptr_t u = u0; u < u0 + S; u++, sums += 3, of += 2) {
      intptr_t j = u * VW;
      int n = units_at(H, u);
      vector r = of[0], z = of[1], h = load_some(c->h[b] + j, n), q = sums[2] + load(c->b_hn + j);
      vector new = hyperbolic(load(c->gi + ((b * c->units + u) * 3 + 2) * VW) + r * q);
      store_some(c->y + b * 2 * H + j, new + z * (h - new), n);
      if (c->gates) {
        real *gates = c->gates + b * 8 * H + j;
        store_some(gates, r, n);
        store_some(gates + H, z, n);
        store_some(gates + 2 * H, new, n);
        store_some(gates + 3 * H, q, n);
      }
    }
}

static void forward(const struct job *job, intptr_t program, char *scratch) {
  const struct forward *c = job->call;
  int d = program % 2;
  intptr_t b0 = program / 2 * job->rows, rows = c->B - b0 < job->rows ? c->B - b0 : job->rows;
  struct forward_scratch s;
  lay_out_forward(&s, c, rows, scratch);
  intptr_t H = c->H, T = c->T;
  const real *x = c->x, *b_ih = c->b_ih[d], *b_hh = c->b_hh[d], *b_hn = b_hh ? b_hh + 2 * H : c->b_hn[d];
  pack_gates(c->w_hh[d], H, s.hh, s.w_hh);
  if (s.w_ih) pack_gates(c->w_ih[d], H, s.ih, s.w_ih);
  for (intptr_t j = 0; j < s.units * VW; j++) {
    for (intptr_t g = 0; g < 3; g++)
      s.bias[j / VW * 3 * VW + g * VW + j % VW] = j < H && b_ih ? b_ih[g * H + j] + (g < 2 ? b_hh[g * H + j] : 0) : 0;
    s.b_hn[j] = j < H && b_hn ? b_hn[j] : 0;
  }
  for (intptr_t b = 0; b < rows; b++) s.states[b] = (const real *)c->h0 + (d * c->B + b0 + b) * H;
  for (intptr_t s0 = 0; s0 < T; s0 += s.chunk) {
    intptr_t end = s0 + s.chunk < T ? s0 + s.chunk : T, count = 0;
    for (intptr_t i = s0; i < end; i++) {
      intptr_t t = d ? T - 1 - i : i, first = first_row(c->table, c->B, t) + b0;
      for (intptr_t b = 0, active = active_rows(c->table, b0, rows, t); b < active; b++, count++)
        if (!s.w_ih) s.inputs[count] = x + (first + b) * 6 * H + d * 3 * H;
        else s.inputs[count] = x + (c->table ? (first + b) * c->x_b : t * c->x_t + (b0 + b) * c->x_b);
    }
    if (s.w_ih) multiply(s.inputs, count, s.ih, 3, finish_gi, &s);
    else
      for (intptr_t i = 0; i < count; i++)
        for (intptr_t u = 0; u < s.units; u++)
          for (intptr_t g = 0; g < 3; g++)
            store(s.gi + ((i * s.units + u) * 3 + g) * VW, load_some(s.inputs[i] + g * H + u * VW, units_at(H, u)));
    const real *gi = s.gi;
    for (intptr_t i = s0; i < end; i++) {
      intptr_t t = d ? T - 1 - i : i;
      intptr_t row = first_row(c->table, c->B, t) + b0, active = active_rows(c->table, b0, rows, t);
      real *y = (real *)c->y + (row * 2 + d) * H, *gates = c->gates ? (real *)c->gates + (row * 2 + d) * 4 * H : NULL;
      struct step step = {gi, s.b_hn, s.states, y, gates, s.units, H};
      multiply(s.states, active, s.hh, 3, finish_step, &step);
      for (intptr_t b = 0; b < active; b++) s.states[b] = y + b * 2 * H;
      gi += active * s.units * 3 * VW;
    }
  }
  for (intptr_t b = 0; b < rows; b++) memcpy((real *)c->h_n + (d * c->B + b0 + b) * H, s.states[b], H * sizeof(real));
}

struct backward_scratch {
  real *w, *dh; // dh: [row][unit vector][VW]
  const real **dgi, **dq;
  struct panels rz, n; // W_hh by unit vector, [k][VW], k over the rows of r and z, and of n
  intptr_t units;
  // Rows of the next step and the distance between them: gates, dy and y, and those to be written, dgi and dq.
  struct ahead { const real *first; intptr_t stride; } ahead[10];
  int from, to; // which of them to fetch
};
static size_t lay_out_backward(struct backward_scratch *s, const struct backward *c, intptr_t rows, char *base) {
  size_t used = 0;
  intptr_t stride = c->H * 3 * VW + LINE / sizeof(real);
  s->units = (c->H + VW - 1) / VW;
  s->w = piece(base, &used, s->units * stride * sizeof(real));
  s->dh = piece(base, &used, rows * s->units * VW * sizeof(real));
  s->dgi = piece(base, &used, rows * sizeof(real *));
  s->dq = piece(base, &used, rows * sizeof(real *));
  s->rz = (struct panels){s->w, s->units, stride, 2 * c->H};
  s->n = (struct panels){base ? s->w + 2 * c->H * VW : NULL, s->units, stride, c->H};
  return used;
}

static void add_dh(void *context, intptr_t u, int S, intptr_t row, int R, const vector *sums) {
  const struct backward_scratch *s = context;
  for (intptr_t b = row; b < row + R; b++)
    for (intptr_t v = u; v < u + S; v++) {
      real *dh = s->dh + (b * s->units + v) * VW;
      store(dh, load(dh) + *sums++);
      // The next step's rows come from memory: fetched during the products, they are there when they are needed.
      if (v % (LINE / VECTOR_BYTES) == 0 || v == u)
        for (int i = s->from; i < s->to; i++) __builtin_prefetch(s->ahead[i].first + b * s->ahead[i].stride + v * VW);
    }
}

static void backward(const struct job *job, intptr_t program, char *scratch) {
  const struct backward *c = job->call;
  int d = program % 2;
  intptr_t b0 = program / 2 * job->rows, rows = c->B - b0 < job->rows ? c->B - b0 : job->rows;
  struct backward_scratch s;
  lay_out_backward(&s, c, rows, scratch);
  intptr_t H = c->H, T = c->T, width = s.units * VW;
  intptr_t of_states = (d * c->B + b0) * H;
  const real *w = c->w_hh[d], *dh_n = (const real *)c->dh_n + of_states, *h0 = (const real *)c->h0 + of_states;
  real *dh0 = (real *)c->dh0 + of_states;
  for (intptr_t u = 0; u < s.units; u++)
    for (intptr_t k = 0; k < 3 * H; k++)
      store(s.w + u * s.rz.stride + k * VW, load_some(w + k * H + u * VW, units_at(H, u)));
  for (intptr_t b = 0; b < rows; b++)
    for (intptr_t j = 0; j < width; j++) s.dh[b * width + j] = j < H ? dh_n[b * H + j] : 0;
  for (intptr_t i = 0; i < T; i++) {
    intptr_t t = d ? i : T - 1 - i, before = d ? t + 1 : t - 1;
    intptr_t row = first_row(c->table, c->B, t) + b0, active = active_rows(c->table, b0, rows, t);
    intptr_t had = i < T - 1 ? active_rows(c->table, b0, rows, before) : 0; // sequences with a step before this one
    const real *y_before = had ? (const real *)c->y + ((first_row(c->table, c->B, before) + b0) * 2 + d) * H : NULL;
    for (intptr_t b = 0; b < active; b++) {
      intptr_t at = (row + b) * 2 + d; // of (P, D)
      const real *gates = (const real *)c->gates + at * 4 * H, *h_prev = b < had ? y_before + b * 2 * H : h0 + b * H;
      const real *dy = (const real *)c->dy + d * H;
      dy += c->table ? (row + b) * c->dy_b : t * c->dy_t + (b0 + b) * c->dy_b;
      real *dgi = (real *)c->dgi + at * 3 * H, *dq = (real *)c->dq + at * H, *dh = s.dh + b * width;
      for (intptr_t j = 0; j < H; j += VW) {
        int some = units_at(H, j / VW);
        vector g = load(dh + j) + load_some(dy + j, some), h = load_some(h_prev + j, some);
        vector r = load_some(gates + j, some), z = load_some(gates + H + j, some);
        vector n = load_some(gates + 2 * H + j, some), q = load_some(gates + 3 * H + j, some);
        vector da_n = g * (1 - z) * (1 - n * n), dq_j = da_n * r;
        store_some(dgi + j, da_n * q * r * (1 - r), some);
        store_some(dgi + H + j, g * (h - n) * z * (1 - z), some);
        store_some(dgi + 2 * H + j, da_n, some);
        store_some(dq + j, dq_j, some);
        store(dh + j, g * z);
      }
      if (c->before) memcpy((real *)c->before + at * H, h_prev, H * sizeof(real));
      s.dgi[b] = dgi, s.dq[b] = dq;
    }
    if (had) {
      intptr_t row_next = first_row(c->table, c->B, before) + b0, next = row_next * 2 + d;
      const real *gates = (const real *)c->gates + next * 4 * H, *dgi = (const real *)c->dgi + next * 3 * H;
      const real *dy = (const real *)c->dy + d * H + (c->table ? row_next * c->dy_b : before * c->dy_t + b0 * c->dy_b);
      for (int g = 0; g < 4; g++) s.ahead[g] = (struct ahead){gates + g * H, 8 * H};
      s.ahead[4] = (struct ahead){dy, c->dy_b};
      s.ahead[5] = (struct ahead){y_before + (row_next - row) * 2 * H, 2 * H}; // right where all steps have as many rows
      for (int g = 0; g < 3; g++) s.ahead[6 + g] = (struct ahead){dgi + g * H, 6 * H};
      s.ahead[9] = (struct ahead){(const real *)c->dq + next * H, 2 * H};
    }
    s.from = 0, s.to = had ? 6 : 0;
    multiply(s.dgi, active, s.rz, 1, add_dh, &s);
    s.from = 6, s.to = had ? 10 : 6;
    multiply(s.dq, active, s.n, 1, add_dh, &s);
  }
  for (intptr_t b = 0; b < rows; b++) memcpy(dh0 + b * H, s.dh + b * width, H * sizeof(real));
}

// Gradients of weights and of the input, products over all steps.
struct products_scratch {
  real *room, *dgi, *dq, *sums_dgi, *sums_dq; // dgi and dq: [unit][MOST_K]
  const real **x, **h_prev, **rows, **rows_dq;
  real **out, **out_hh;
};
static size_t lay_out_products(struct products_scratch *s, char *base) {
  size_t used = 0, units = MOST_UNITS + VW, pointers = INPUT_ROWS * sizeof(real *);
  s->room = piece(base, &used, PANEL_ROOM * sizeof(real));
  s->dgi = piece(base, &used, units * MOST_K * sizeof(real));
  s->dq = piece(base, &used, units * MOST_K * sizeof(real));
  s->sums_dgi = piece(base, &used, units * sizeof(real));
  s->sums_dq = piece(base, &used, units * sizeof(real));
  const real ***inputs[] = {&s->x, &s->h_prev, &s->rows, &s->rows_dq};
  for (int i = 0; i < 4; i++) *inputs[i] = piece(base, &used, pointers);
  s->out = piece(base, &used, pointers);
  s->out_hh = piece(base, &used, pointers);
  return used;
}

// The gradients of rows from ... from + units of a gate of W_ih and W_hh, and of their biases.
static void weight_gradients(const struct products *c, int d, int gate, intptr_t from, intptr_t units, char *scratch) {
  struct products_scratch s;
  lay_out_products(&s, scratch);
  intptr_t H = c->H, first = gate * H + from, t = 0, b = 0, active = active_rows(c->table, 0, c->B, 0);
  int own = gate == 2; // dq is the gradient of n's product with the state, dgi that of the others
  real *dw_ih = c->dw_ih[d], *dw_hh = c->dw_hh[d], *db_ih = c->db_ih[d], *db_hh = c->db_hh[d];
  for (intptr_t j = 0; j < units; j++) {
    s.rows[j] = s.dgi + j * MOST_K, s.rows_dq[j] = own ? s.dq + j * MOST_K : s.rows[j];
    s.out[j] = dw_ih ? dw_ih + (first + j) * c->I : NULL, s.out_hh[j] = dw_hh ? dw_hh + (first + j) * H : NULL;
  }
  memset(s.sums_dgi, 0, (units + VW) * sizeof(real)), memset(s.sums_dq, 0, (units + VW) * sizeof(real));
  for (intptr_t p = 0; p < c->P; p += MOST_K) {
    intptr_t K = c->P - p < MOST_K ? c->P - p : MOST_K;
    for (intptr_t k = 0; k < K; k++, b++) {
      if (b == active) t++, b = 0, active = active_rows(c->table, 0, c->B, t);
      intptr_t before = d ? t + 1 : t - 1, end = c->table ? (intptr_t)c->table[b] : c->T;
      s.x[k] = (const real *)c->x + (c->table ? (p + k) * c->x_b : t * c->x_t + b * c->x_b);
      s.h_prev[k] = before >= 0 && before < end
        ? (const real *)c->y + ((first_row(c->table, c->B, before) + b) * 2 + d) * H
        : (const real *)c->h0 + (d * c->B + b) * H;
    }
    transpose_rows((const real *)c->dgi + (p * 2 + d) * 3 * H + first, 6 * H, K, units, s.dgi, s.sums_dgi);
    if (own) transpose_rows((const real *)c->dq + (p * 2 + d) * H + from, 2 * H, K, units, s.dq, s.sums_dq);
    if (dw_ih) multiply_rows(s.rows, units, s.x, K, c->I, s.out, p == 0, s.room);
    if (dw_hh) multiply_rows(s.rows_dq, units, s.h_prev, K, H, s.out_hh, p == 0, s.room);
  }
  if (db_ih) memcpy(db_ih + first, s.sums_dgi, units * sizeof(real));
  if (db_hh) memcpy(db_hh + first, own ? s.sums_dq : s.sums_dgi, units * sizeof(real));
}

// The gradient of rows from ... from + n of the input: of both directions at once, a product over 6H.
static void input_gradient(const struct products *c, intptr_t from, intptr_t n, char *scratch) {
  struct products_scratch s;
  lay_out_products(&s, scratch);
  intptr_t H = c->H;
  for (intptr_t r = 0; r < n; r++) s.out[r] = (real *)c->dx + (from + r) * c->I;
  for (intptr_t k0 = 0; k0 < 6 * H; k0 += MOST_K) {
    intptr_t K = 6 * H - k0 < MOST_K ? 6 * H - k0 : MOST_K;
    for (intptr_t r = 0; r < n; r++) s.rows[r] = (const real *)c->dgi + (from + r) * 6 * H + k0;
    for (intptr_t k = 0; k < K; k++) {
      intptr_t row = k0 + k;
      s.x[k] = (const real *)c->w_ih[row >= 3 * H] + row % (3 * H) * c->I;
    }
    multiply_rows(s.rows, n, s.x, K, c->I, s.out, k0 == 0, s.room);
  }
}

// First the programs of weights, job->parts for each gate of each direction, then those of the input.
static void products(const struct job *job, intptr_t program, char *scratch) {
  const struct products *c = job->call;
  intptr_t weights = 6 * job->parts, part = program / 6, from = c->H * part / job->parts;
  if (program < weights)
    weight_gradients(c, program % 2, program / 2 % 3, from, c->H * (part + 1) / job->parts - from, scratch);
  else {
    from = (program - weights) * job->rows;
    input_gradient(c, from, c->P - from < job->rows ? c->P - from : job->rows, scratch);
  }
}

static void *do_programs(void *argument) {
  struct job *job = argument;
  char *scratch = job->scratch + atomic_fetch_add(&job->threads, 1) * job->scratch_bytes;
  for (intptr_t i; (i = atomic_fetch_add(&job->next, 1)) < job->programs;) job->program(job, i, scratch);
  return NULL;
}

// Sequences of one program: blocks that fill the threads, but not so small that weights are read for few rows.
static intptr_t block_rows(intptr_t B, intptr_t threads) {
  intptr_t blocks = (B + BLOCK_ROWS - 1) / BLOCK_ROWS, most = (B + 3) / 4;
  if (blocks < (threads + 1) / 2) blocks = (threads + 1) / 2;
  if (blocks > most) blocks = most;
  intptr_t rows = (B + blocks - 1) / blocks;
  return rows < MAX_ROWS ? rows : (rows + MAX_ROWS - 1) / MAX_ROWS * MAX_ROWS;
}

// `work` counts multiplications: a thread that would do few of them costs more than it saves.
static int run(struct job *job, intptr_t threads, intptr_t work) {
  pthread_t others[64];
  int started = 0;
  if (threads > 1 + work / THREAD_WORK) threads = 1 + work / THREAD_WORK;
  if (threads > job->programs) threads = job->programs;
  if (threads > 65) threads = 65;
  void *memory;
  if (posix_memalign(&memory, LINE, job->scratch_bytes * threads)) return -1;
  job->scratch = memory;
  pthread_attr_t attributes;
  pthread_attr_init(&attributes);
#ifdef __linux__
  // Away from this thread's processor, where a new thread may else wait for milliseconds until it is moved.
  cpu_set_t processors;
  if (!sched_getaffinity(0, sizeof processors, &processors)) {
    CPU_CLR(sched_getcpu(), &processors);
    if (CPU_COUNT(&processors)) pthread_attr_setaffinity_np(&attributes, sizeof processors, &processors);
  }
#endif
  // Where the system refuses a thread the others do its work.
  while (started < threads - 1 && !pthread_create(&others[started], &attributes, do_programs, job)) started++;
  pthread_attr_destroy(&attributes);
  do_programs(job);
  while (started) pthread_join(others[--started], NULL);
  free(memory);
  return 0;
}

// Each does one call on so many threads, and returns -1 where there is no memory for it.
static int run_forward(const void *call, intptr_t threads) {
  const struct forward *c = call;
  struct forward_scratch s;
  intptr_t rows = block_rows(c->B, threads), blocks = (c->B + rows - 1) / rows;
  struct job job = {forward, call, .rows = rows, .programs = 2 * blocks};
  job.scratch_bytes = lay_out_forward(&s, c, rows, NULL);
  return run(&job, threads, c->T * c->B * 6 * c->H * (c->I + c->H));
}
static int run_backward(const void *call, intptr_t threads) {
  const struct backward *c = call;
  struct backward_scratch s;
  intptr_t rows = block_rows(c->B, threads), blocks = (c->B + rows - 1) / rows;
  struct job job = {backward, call, .rows = rows, .programs = 2 * blocks};
  job.scratch_bytes = lay_out_backward(&s, c, rows, NULL);
  return run(&job, threads, c->T * c->B * 6 * c->H * c->H);
}
static int run_products(const void *call, intptr_t threads) {
  const struct products *c = call;
  struct products_scratch s;
  struct job job = {products, call, .parts = (c->H + MOST_UNITS - 1) / MOST_UNITS};
  if (job.parts < (threads + 5) / 6) job.parts = (threads + 5) / 6;
  if (job.parts > c->H) job.parts = c->H;
  intptr_t rows = (c->P + threads - 1) / threads;
  job.rows = rows < INPUT_ROWS ? rows : INPUT_ROWS;
  job.programs = 6 * job.parts + (c->dx ? (c->P + job.rows - 1) / job.rows : 0);
  job.scratch_bytes = lay_out_products(&s, NULL);
  return run(&job, threads, c->P * 6 * c->H * (c->I + c->H));
}

#ifdef MODULE
// forward(threads, *fields of struct forward), and so backward and products: no checks, the caller is
// bigru/kernels/cpu.py.
static PyObject *call(PyObject *const *args, Py_ssize_t count, void *fields, Py_ssize_t expected,
                      int (*run)(const void *, intptr_t)) {
  if (count != expected + 1)
    return PyErr_Format(PyExc_TypeError, "expected %zd integers, got %zd", expected + 1, count);
  intptr_t threads = PyLong_AsSsize_t(args[0]);
  for (Py_ssize_t i = 0; i < expected; i++) ((intptr_t *)fields)[i] = (intptr_t)PyLong_AsSsize_t(args[i + 1]);
  if (PyErr_Occurred()) return NULL;
  int failed;
  Py_BEGIN_ALLOW_THREADS
  failed = run(fields, threads);
  Py_END_ALLOW_THREADS
  if (failed) return PyErr_NoMemory();
  Py_INCREF(Py_None);
  return Py_None;
}

#define FUNCTION(name) \
  static PyObject *py_##name(PyObject *self, PyObject *const *args, Py_ssize_t count) { \
    struct name fields; \
    return call(args, count, &fields, sizeof fields / sizeof(intptr_t), run_##name); }
#define METHOD(name, text) {#name, (PyCFunction)(void (*)(void))py_##name, METH_FASTCALL, text}
FUNCTION(forward)
FUNCTION(backward)
FUNCTION(products)

static PyMethodDef methods[] = {
  METHOD(forward, "The layer, or the recurrence on given gi."),
  METHOD(backward, "The recurrence's gradient."),
  METHOD(products, "The gradients of the input and the weights, from the recurrence's."),
  {NULL, NULL, 0, NULL},
};
#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define TEXT_(x) #x
#define TEXT(x) TEXT_(x)
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, TEXT(MODULE), NULL, -1, methods, NULL, NULL, NULL, NULL};
PyMODINIT_FUNC JOIN(PyInit, MODULE)(void) { return PyModule_Create(&module); }
#endif
