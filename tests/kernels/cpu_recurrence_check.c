// The C kernel beside loops in double, for compilers and processors that Python's own build does not try.
//
// Exit code 0 if y, h_n, the gates and every gradient of many shapes are right, of sequences of one length and of several,
// and y for a given input product.

#define THREAD_WORK 1 /* two threads for every shape */
#include "../../bigru/kernels/cpu_recurrence.c"
#include <math.h>
#include <stdio.h>

static double worst;

// Numbers in [-scale, scale]; NaN for memory that is to be written.
static real *numbers(size_t count, double scale) {
  static uint64_t state = 88172645463325252u;
  real *p = malloc((count + 1) * sizeof(real));
  for (size_t i = 0; i < count; i++) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    p[i] = scale * ((double)(state >> 11) / 4503599627370496.0 - 1);
  }
  return p;
}

static void compare(const real *actual, const double *expected, size_t count) {
  double difference = 0, norm = 1e-30;
  for (size_t i = 0; i < count; i++) {
    difference += (actual[i] - expected[i]) * (actual[i] - expected[i]);
    norm += expected[i] * expected[i];
  }
  double error = sqrt(difference / norm);
  if (!(error <= worst)) worst = error == error ? error : INFINITY; // NaN is the worst
}

// Sequence b of B has T steps, or, if `ragged`, so many of them, the longest first.
static intptr_t length(intptr_t T, intptr_t B, intptr_t b, int ragged) { return ragged ? T - b * (T - 1) / B : T; }

static void check(intptr_t T, intptr_t B, intptr_t I, intptr_t H, int ragged) {
  int64_t *table = calloc(B + T, sizeof *table), P = 0;
  for (intptr_t b = 0; b < B; b++) table[b] = length(T, B, b, ragged);
  for (intptr_t t = 0; t < T; t++) {
    table[B + t] = P;
    for (intptr_t b = 0; b < B; b++) P += table[b] > t;
  }
  size_t rows = P * 2, states = 2 * B * H; // rows of (P, D)
  struct forward f = {.table = ragged ? table : NULL, .T = T, .B = B, .I = I, .H = H, .x_t = B * I, .x_b = I};
  struct backward g = {.table = f.table, .T = T, .B = B, .H = H, .dy_t = 2 * B * H, .dy_b = 2 * H};
  for (int d = 0; d < 2; d++) {
    f.w_ih[d] = numbers(3 * H * I, 0.3), f.w_hh[d] = numbers(3 * H * H, 0.3);
    f.b_ih[d] = numbers(3 * H, 0.3), f.b_hh[d] = numbers(3 * H, 0.3), g.w_hh[d] = f.w_hh[d];
  }
  f.x = numbers(P * I, 1), g.h0 = f.h0 = numbers(states, 1), g.dy = numbers(rows * H, 1);
  g.dh_n = numbers(states, 1), g.y = f.y = numbers(rows * H, NAN), g.gates = f.gates = numbers(rows * 4 * H, NAN);
  f.h_n = numbers(states, NAN), g.dgi = numbers(rows * 3 * H, NAN), g.dq = numbers(rows * H, NAN);
  g.dh0 = numbers(states, NAN), g.before = numbers(rows * H, NAN);
  struct products m = {.x = f.x, .y = f.y, .h0 = f.h0, .dgi = g.dgi, .dq = g.dq, .table = f.table, .P = P, .T = T, .B = B,
                       .I = I, .H = H, .x_t = f.x_t, .x_b = I, .dx = numbers(P * I, NAN)};
  for (int d = 0; d < 2; d++) {
    // In one piece, and compared as one: sums of a few numbers that cancel would show the last digits of those.
    real *dw = numbers(3 * H * (I + H + 2), NAN);
    m.w_ih[d] = f.w_ih[d], m.dw_ih[d] = dw, m.dw_hh[d] = dw += 3 * H * I, m.db_ih[d] = dw += 3 * H * H;
    m.db_hh[d] = dw + 3 * H;
  }
  if (run_forward(&f, 2) || run_backward(&g, 2) || run_products(&m, 2)) exit(2);

  real *gi = numbers(rows * 3 * H, 0);
  double *y = calloc(rows * H, 8), *gates = calloc(rows * 4 * H, 8), *before = calloc(rows * H, 8);
  double *dgi = calloc(rows * 3 * H, 8), *dq = calloc(rows * H, 8), *h_n = calloc(states, 8), *dh0 = calloc(states, 8);
  double *dx = calloc(P * I, 8);
  for (int d = 0; d < 2; d++) {
    const real *w_ih = f.w_ih[d], *w = f.w_hh[d], *b_ih = f.b_ih[d], *b_hh = f.b_hh[d];
    for (intptr_t b = 0; b < B; b++) {
      double *h = h_n + (d * B + b) * H, *dh = dh0 + (d * B + b) * H;
      for (intptr_t j = 0; j < H; j++) {
        h[j] = ((const real *)f.h0)[(d * B + b) * H + j];
        dh[j] = ((const real *)g.dh_n)[(d * B + b) * H + j];
      }
      for (intptr_t s = 0; s < table[b]; s++) {
        size_t row = table[B + (d ? table[b] - 1 - s : s)] + b, at = row * 2 + d;
        const real *x = (const real *)f.x + row * I;
        memcpy(before + at * H, h, H * sizeof *h);
        for (intptr_t j = 0; j < H; j++) {
          double a[3], q[3];
          for (int k = 0; k < 3; k++) {
            a[k] = b_ih[k * H + j], q[k] = b_hh[k * H + j];
            for (intptr_t i = 0; i < I; i++) a[k] += (double)w_ih[(k * H + j) * I + i] * x[i];
            gi[at * 3 * H + k * H + j] = a[k] + (k < 2 ? q[k] : 0);
            for (intptr_t i = 0; i < H; i++) q[k] += (double)w[(k * H + j) * H + i] * before[at * H + i];
          }
          double r = 1 / (1 + exp(-a[0] - q[0])), z = 1 / (1 + exp(-a[1] - q[1])), n = tanh(a[2] + r * q[2]);
          double *kept = gates + at * 4 * H + j;
          kept[0] = r, kept[H] = z, kept[2 * H] = n, kept[3 * H] = q[2];
          y[at * H + j] = h[j] = n + z * (before[at * H + j] - n);
        }
      }
      for (intptr_t s = table[b] - 1; s >= 0; s--) {
        size_t at = (table[B + (d ? table[b] - 1 - s : s)] + b) * 2 + d;
        for (intptr_t j = 0; j < H; j++) {
          double *kept = gates + at * 4 * H + j, r = kept[0], z = kept[H], n = kept[2 * H], q = kept[3 * H];
          double dy = dh[j] + ((const real *)g.dy)[at * H + j], da = dy * (1 - z) * (1 - n * n);
          dgi[at * 3 * H + j] = da * q * r * (1 - r), dgi[at * 3 * H + 2 * H + j] = da;
          dgi[at * 3 * H + H + j] = dy * (before[at * H + j] - n) * z * (1 - z);
          dq[at * H + j] = da * r, dh[j] = dy * z;
        }
        for (intptr_t j = 0; j < H; j++)
          for (intptr_t i = 0; i < H; i++)
            dh[i] += dgi[at * 3 * H + j] * w[j * H + i] + dgi[at * 3 * H + H + j] * w[(H + j) * H + i] +
                     dq[at * H + j] * w[(2 * H + j) * H + i];
      }
    }
    double *dw_ih = calloc(3 * H * (I + H + 2), 8), *dw_hh = dw_ih + 3 * H * I, *db_ih = dw_hh + 3 * H * H;
    double *db_hh = db_ih + 3 * H;
    for (intptr_t p = 0; p < P; p++)
      for (intptr_t j = 0; j < 3 * H; j++) {
        double da = dgi[(p * 2 + d) * 3 * H + j], da_h = j < 2 * H ? da : dq[(p * 2 + d) * H + j - 2 * H];
        db_ih[j] += da, db_hh[j] += da_h;
        for (intptr_t i = 0; i < I; i++) {
          dw_ih[j * I + i] += da * ((const real *)f.x)[p * I + i];
          dx[p * I + i] += da * w_ih[j * I + i];
        }
        for (intptr_t i = 0; i < H; i++) dw_hh[j * H + i] += da_h * before[(p * 2 + d) * H + i];
      }
    compare(m.dw_ih[d], dw_ih, 3 * H * (I + H + 2));
    f.b_hn[d] = b_hh + 2 * H, f.w_ih[d] = f.b_ih[d] = f.b_hh[d] = NULL;
  }
  compare(f.y, y, rows * H), compare(f.gates, gates, rows * 4 * H), compare(f.h_n, h_n, states);
  compare(g.dgi, dgi, rows * 3 * H), compare(g.dq, dq, rows * H), compare(g.dh0, dh0, states);
  compare(g.before, before, rows * H), compare(m.dx, dx, P * I);
  f.x = gi, f.y = numbers(rows * H, NAN), f.gates = NULL;
  if (run_forward(&f, 2)) exit(2);
  compare(f.y, y, rows * H);
}

int main(void) {
  // On both sides of every tile and vector.
  const int batches[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 17, 70}, sizes[] = {1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 33};
  for (int b = 0; b < 12; b++)
    for (int h = 0; h < 12; h++) check(3, batches[b], 5, sizes[h], b % 2), check(3, batches[b], 2, sizes[h], 1 - b % 2);
  check(70, 1, 9, 20, 0);
  printf("vectors of %d, worst error %.1e\n", VW, worst);
  return worst > (sizeof(real) == 4 ? 1e-6 : 1e-14);
}
