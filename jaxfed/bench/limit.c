// The arithmetic of one federated round, and nothing else: matrix factorisation with item biases and private user
// vectors, binary cross-entropy, mini-batch SGD on each client, the mean weighted by examples at the server, on the
// rows that were touched. One core, no sampling, no packing: the distance to the machine for `jaxfed bench`.
#include <math.h>
#include <string.h>

// items [N, d], biases [N]: updated. users [C, d] -> trained [C, d]. Client c has examples first[c] to first[c + 1]
// (position among its own rows, label) and rows held[begin[c]] to held[begin[c + 1]]. batch <= 1024, d <= 256.
// slice [most rows, d] and slice_bias are scratch; sum [N, d] and sum_bias [N] hold zeros before and after.
void fed_round(float *items, float *biases, const float *users, float *trained, const int *first, const int *position,
               const float *label, const int *begin, const int *held, int clients, int batch, int d, float rate,
               float *slice, float *slice_bias, float *sum, float *sum_bias) {
    float examples = first[clients];
    for (int c = 0; c < clients; c++) {
        const int *mine = held + begin[c];
        const int rows = begin[c + 1] - begin[c], count = first[c + 1] - first[c];
        float user[256], slope[256], error[1024];
        memcpy(user, users + (long)c * d, sizeof(float) * d);
        for (int k = 0; k < rows; k++) {
            memcpy(slice + (long)k * d, items + (long)mine[k] * d, sizeof(float) * d);
            slice_bias[k] = biases[mine[k]];
        }
        for (int start = 0; start < count; start += batch) {
            const int size = count - start < batch ? count - start : batch;
            const int *at = position + first[c] + start;
            for (int j = 0; j < size; j++) {
                const float *row = slice + (long)at[j] * d;
                float logit = 0;
                for (int i = 0; i < d; i++) logit += row[i] * user[i];
                logit += slice_bias[at[j]];
                error[j] = (1.f / (1.f + expf(-logit)) - label[first[c] + start + j]) * rate / size;
            }
            memset(slope, 0, sizeof(float) * d);
            for (int j = 0; j < size; j++) {
                const float *row = slice + (long)at[j] * d;
                for (int i = 0; i < d; i++) slope[i] += error[j] * row[i];
            }
            for (int j = 0; j < size; j++) {
                float *row = slice + (long)at[j] * d;
                for (int i = 0; i < d; i++) row[i] -= error[j] * user[i];
                slice_bias[at[j]] -= error[j];
            }
            for (int i = 0; i < d; i++) user[i] -= slope[i];
        }
        memcpy(trained + (long)c * d, user, sizeof(float) * d);
        const float weight = count / examples;
        for (int k = 0; k < rows; k++) {
            float *to = sum + (long)mine[k] * d, *now = slice + (long)k * d;
            const float *was = items + (long)mine[k] * d;
            for (int i = 0; i < d; i++) to[i] += weight * (now[i] - was[i]);
            sum_bias[mine[k]] += weight * (slice_bias[k] - biases[mine[k]]);
        }
    }
    for (int k = 0; k < begin[clients]; k++) { // a row that several hold is added once: its sum is zero afterwards
        float *row = items + (long)held[k] * d, *from = sum + (long)held[k] * d;
        for (int i = 0; i < d; i++) row[i] += from[i], from[i] = 0;
        biases[held[k]] += sum_bias[held[k]], sum_bias[held[k]] = 0;
    }
}
