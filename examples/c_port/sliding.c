/* The sliding branch in C, and its check against golden vectors. One file, no dependencies.
 *
 *     nsa-ref vectors vectors
 *     cc -O2 -o sliding sliding.c -lm
 *     ./sliding vectors/sliding-PAPER-*.safetensors
 *     mkdir answers && ./sliding -o answers vectors/sliding-PAPER-*.safetensors
 *     nsa-ref check vectors answers
 *
 * The first run compares mask, out and lse with what the vectors hold, each element within its
 * bound, and ends with 0 if all are right, with 1 if one is not, with 2 if it could not read a
 * file. With -o it writes its results as files that `nsa-ref check` judges.
 *
 * It computes in double and has float64, float32 and bfloat16; float16 it refuses. It assumes a
 * little-endian machine. Compiled with -DPLANTED_BUG its window is one key short.
 */

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void fail(const char *file, const char *why) {
    fprintf(stderr, "%s: %s\n", file, why);
    exit(2);
}

static void *reserve(size_t bytes) {
    void *room = calloc(bytes ? bytes : 1, 1);
    if (!room) fail("sliding", "out of memory");
    return room;
}

/* ---- JSON, as far as a header needs it: values are found by key, and skipped ---- */

static const char *blanks(const char *p) {
    while (*p == ' ' || *p == '\n' || *p == '\t' || *p == '\r') p++;
    return p;
}

/* Behind the value that begins at p. */
static const char *skip(const char *p) {
    int depth = 0;
    do {
        p = blanks(p);
        if (*p == '"') {
            for (p++; *p && *p != '"'; p++)
                if (*p == '\\' && p[1]) p++;
            if (*p) p++;
        } else if (*p == '{' || *p == '[') {
            depth++, p++;
        } else if (*p == '}' || *p == ']') {
            depth--, p++;
        } else if (*p == ',' || *p == ':') {
            p++;
        } else {
            while (*p && !strchr(",:]}{[\" \n\t\r", *p)) p++;
        }
    } while (depth > 0 && *p);
    return p;
}

/* The value of a key of the object that begins at p, or NULL. */
static const char *member(const char *p, const char *key) {
    size_t length = strlen(key);
    if (!p || *(p = blanks(p)) != '{') return NULL;
    for (p = blanks(p + 1); *p == '"'; p = blanks(p)) {
        int found = !strncmp(p + 1, key, length) && p[1 + length] == '"';
        p = blanks(skip(p));
        if (*p != ':') return NULL;
        p = blanks(p + 1);
        if (found) return p;
        p = blanks(skip(p));
        if (*p == ',') p++;
    }
    return NULL;
}

/* The text that begins at p, its escapes undone; texts of vectors are ASCII. */
static char *text(const char *p) {
    if (!p || *p != '"') return NULL;
    char *copy = reserve(skip(p) - p), *end = copy;
    for (p++; *p && *p != '"'; p++) {
        if (*p == '\\') p++;
        *end++ = *p;
    }
    return copy;
}

static long number(const char *file, const char *object, const char *key) {
    const char *p = member(object, key);
    if (!p) fail(file, key);
    return strtol(p, NULL, 10);
}

static int is_true(const char *object, const char *key) {
    const char *p = member(object, key);
    return p && !strncmp(p, "true", 4);
}

/* ---- safetensors: 8 bytes with the header's length, the header, the tensors ---- */

typedef struct {
    const char *name;
    char *header, *bytes;
    size_t size; /* of the tensors */
} File;

typedef struct {
    char dtype[8];
    long shape[4];
    size_t count; /* of elements */
    const unsigned char *bytes;
} Tensor;

static File open_file(const char *name) {
    FILE *stream = fopen(name, "rb");
    if (!stream) fail(name, "cannot be opened");
    uint64_t length;
    if (fread(&length, 8, 1, stream) != 1 || length > 100000000) fail(name, "is no safetensors");
    fseek(stream, 0, SEEK_END);
    long end = ftell(stream);
    if (end < 8 || (uint64_t)end - 8 < length) fail(name, "is shorter than its header");
    File file = {name, reserve(length + 1), NULL, (size_t)end - 8 - length};
    file.bytes = reserve(file.size);
    fseek(stream, 8, SEEK_SET);
    if (fread(file.header, 1, length, stream) != length) fail(name, "cannot be read");
    if (fread(file.bytes, 1, file.size, stream) != file.size) fail(name, "cannot be read");
    fclose(stream);
    return file;
}

static size_t size_of(const char *dtype) {
    if (!strcmp(dtype, "F64") || !strcmp(dtype, "I64")) return 8;
    if (!strcmp(dtype, "F32")) return 4;
    if (!strcmp(dtype, "F16") || !strcmp(dtype, "BF16")) return 2;
    return strcmp(dtype, "U8") ? 0 : 1;
}

static Tensor tensor(File file, const char *name) {
    Tensor found = {"", {1, 1, 1, 1}, 1, NULL};
    const char *about = member(file.header, name);
    char *dtype = text(member(about, "dtype"));
    const char *p = member(about, "shape"), *offsets = member(about, "data_offsets");
    if (!dtype || strlen(dtype) > 7 || !p || !offsets) fail(file.name, name);
    strcpy(found.dtype, dtype);
    free(dtype);
    for (int i = 0; i < 4 && *p != ']'; i++) {
        char *end;
        found.shape[i] = strtol(p + 1, &end, 10);
        if (found.shape[i] < 0 || found.shape[i] > 1000000) fail(file.name, name);
        p = blanks(end);
        found.count *= (size_t)found.shape[i];
        if (found.count > file.size) fail(file.name, name);
    }
    size_t start = strtoul(offsets + 1, NULL, 10);
    if (!size_of(found.dtype) || start > file.size ||
        found.count > (file.size - start) / size_of(found.dtype))
        fail(file.name, name);
    found.bytes = (const unsigned char *)file.bytes + start;
    return found;
}

/* Element i as a double; bfloat16 is the upper half of a float32. */
static double at(Tensor t, size_t i) {
    const unsigned char *p = t.bytes + i * size_of(t.dtype);
    double wide;
    float narrow;
    uint16_t half;
    if (!strcmp(t.dtype, "U8")) return *p;
    if (!strcmp(t.dtype, "F64")) return memcpy(&wide, p, 8), wide;
    if (!strcmp(t.dtype, "F32")) return memcpy(&narrow, p, 4), narrow;
    memcpy(&half, p, 2);
    uint32_t bits = (uint32_t)half << 16;
    memcpy(&narrow, &bits, 4);
    return narrow;
}

/* Store a double as an element of this dtype, to nearest and even. */
static void store(const char *dtype, unsigned char *p, double value) {
    float narrow = (float)value;
    uint32_t bits;
    if (!strcmp(dtype, "F64")) {
        memcpy(p, &value, 8);
    } else if (!strcmp(dtype, "F32")) {
        memcpy(p, &narrow, 4);
    } else {
        memcpy(&bits, &narrow, 4);
        if (value == value) bits += 0x7FFF + (bits >> 16 & 1);
        uint16_t half = (uint16_t)(bits >> 16);
        memcpy(p, &half, 2);
    }
}

/* ---- the port: clauses W1 to W3, A1, A2 ---- */

typedef struct {
    long batch, q_heads, kv_heads, q_len, kv_len, head_dim, value_dim, window;
    int causal;
} Sizes;

/* Key j is visible from p = t + kv_len - q_len: 0 <= p - j <= w, or |p - j| <= w; from p < 0 no
 * key is. */
static int visible(Sizes n, long t, long j) {
    long p = t + n.kv_len - n.q_len, distance = n.causal ? p - j : labs(p - j);
    if (p < 0) return 0;
#ifdef PLANTED_BUG
    return distance >= 0 && distance < n.window;
#else
    return distance >= 0 && distance <= n.window;
#endif
}

static void sliding(Sizes n, Tensor q, Tensor k, Tensor v, unsigned char *mask, double *out,
                    double *lse) {
    double *weight = reserve((size_t)n.kv_len * sizeof(double));
    for (long b = 0; b < n.batch; b++)
        for (long h = 0; h < n.q_heads; h++)
            for (long t = 0; t < n.q_len; t++) {
                size_t row = (size_t)((b * n.q_heads + h) * n.q_len + t);
                size_t keys = (size_t)((b * n.kv_heads + h / (n.q_heads / n.kv_heads)) * n.kv_len);
                double most = -INFINITY, total = 0;
                for (long j = 0; j < n.kv_len; j++) {
                    double dot = 0;
                    for (long c = 0; c < n.head_dim; c++)
                        dot += at(q, row * n.head_dim + c) * at(k, (keys + j) * n.head_dim + c);
                    weight[j] = dot / sqrt((double)n.head_dim);
                    mask[row * n.kv_len + j] = (unsigned char)visible(n, t, j);
                    if (visible(n, t, j) && weight[j] > most) most = weight[j];
                }
                for (long j = 0; j < n.kv_len; j++) {
                    weight[j] = visible(n, t, j) ? exp(weight[j] - most) : 0;
                    total += weight[j];
                }
                /* a row that sees no key: out is 0, lse is -inf */
                lse[row] = total > 0 ? most + log(total) : -INFINITY;
                for (long c = 0; c < n.value_dim; c++) {
                    double sum = 0;
                    for (long j = 0; j < n.kv_len; j++)
                        sum += weight[j] * at(v, (keys + j) * n.value_dim + c);
                    out[row * n.value_dim + c] = total > 0 ? sum / total : 0;
                }
            }
    free(weight);
}

/* ---- one file: check, and answer ---- */

/* How many elements are further from what the vector says than its bound, which may be inf. */
static size_t wrong_elements(File file, const char *row, const char *name, const double *found,
                             size_t count) {
    char bound_name[80];
    snprintf(bound_name, sizeof bound_name, "bound/%s/%s", row, name);
    Tensor expected = tensor(file, name), bound = tensor(file, bound_name);
    size_t wrong = 0;
    if (expected.count != count || bound.count != count) fail(file.name, name);
    for (size_t i = 0; i < count; i++) {
        double want = at(expected, i), limit = at(bound, i);
        int right = found[i] == want || fabs(found[i] - want) <= limit || limit == INFINITY;
        if (!right && !wrong++)
            printf("%s: %s[%zu] is %.9g, expected %.9g, bound %.3g\n", file.name, name, i, found[i],
                   want, limit);
    }
    return wrong;
}

static char *answer_path(const char *folder, const char *name) {
    const char *slash = strrchr(name, '/');
    const char *base = slash ? slash + 1 : name;
    char *path = reserve(strlen(folder) + strlen(base) + 2);
    sprintf(path, "%s/%s", folder, base);
    return path;
}

static void write_answer(const char *folder, File file, const char *header, const void *bytes,
                         size_t size) {
    char *path = answer_path(folder, file.name);
    FILE *stream = fopen(path, "wb");
    uint64_t length = strlen(header);
    if (!stream) fail(path, "cannot be written");
    fwrite(&length, 8, 1, stream);
    fwrite(header, 1, length, stream);
    fwrite(bytes, 1, size, stream);
    if (fclose(stream)) fail(path, "cannot be written");
    free(path);
}

static int check(const char *name, const char *folder) {
    File file = open_file(name);
    const char *about = member(file.header, "__metadata__");
    char *method = text(member(about, "method")), *with = text(member(about, "case"));
    char *rows = text(member(about, "numerics"));
    const char *switches = member(with, "semantics");
    if (!method || !with || !rows || !switches || rows[0] != '[')
        fail(name, "has no case: it is no vector");
    if (strcmp(method, "sliding")) fail(name, "is about another branch");
    if (!is_true(switches, "window_closed")) fail(name, "has an open window");
    char *first = text(rows + 1); /* a list of rows, the usual one first */
    Tensor q = tensor(file, "in/q"), k = tensor(file, "in/k"), v = tensor(file, "in/v");
    size_t wrong = 0;
    if (!strcmp(q.dtype, "F16")) {
        printf("%s: float16 is not offered\n", name);
        if (folder)
            write_answer(folder, file, "{\"__metadata__\":{\"refused\":\"float16\"}}", "", 0);
    } else {
        Sizes n = {q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3],
                   v.shape[3], number(name, with, "sliding_window_size"),
                   is_true(switches, "causal")};
        size_t keys = (size_t)(n.batch * n.kv_heads * n.kv_len);
        if (!n.kv_heads || n.q_heads % n.kv_heads || k.count != keys * (size_t)n.head_dim ||
            v.count != keys * (size_t)n.value_dim)
            fail(name, "has q, k and v of different sizes");
        size_t all = (size_t)(n.batch * n.q_heads * n.q_len);
        size_t cells = all * (size_t)n.kv_len, values = all * (size_t)n.value_dim;
        unsigned char *mask = reserve(cells);
        double *out = reserve(values * 8), *lse = reserve(all * 8);
        sliding(n, q, k, v, mask, out, lse);
        Tensor expected = tensor(file, "mask");
        if (expected.count != cells) fail(name, "mask");
        for (size_t i = 0; i < cells; i++)
            if (mask[i] != at(expected, i) && !wrong++)
                printf("%s: mask[%zu] is %d, expected %g\n", name, i, mask[i], at(expected, i));
        wrong += wrong_elements(file, first, "out", out, values);
        wrong += wrong_elements(file, first, "lse", lse, all);
        if (folder) {
            /* lse stands first, in float32 at least; then out, as its inputs are; then the mask */
            const char *wide = strcmp(q.dtype, "F64") ? "F32" : "F64";
            size_t width = size_of(q.dtype), start = all * size_of(wide);
            size_t end = start + values * width;
            unsigned char *bytes = reserve(end + cells);
            char header[1000];
            for (size_t i = 0; i < all; i++) store(wide, bytes + i * size_of(wide), lse[i]);
            for (size_t i = 0; i < values; i++) store(q.dtype, bytes + start + i * width, out[i]);
            memcpy(bytes + end, mask, cells);
            snprintf(header, sizeof header,
                     "{\"lse\":{\"dtype\":\"%s\",\"shape\":[%ld,%ld,%ld],"
                     "\"data_offsets\":[0,%zu]},"
                     "\"mask\":{\"dtype\":\"U8\",\"shape\":[%ld,%ld,%ld,%ld],"
                     "\"data_offsets\":[%zu,%zu]},"
                     "\"out\":{\"dtype\":\"%s\",\"shape\":[%ld,%ld,%ld,%ld],"
                     "\"data_offsets\":[%zu,%zu]}}",
                     wide, n.batch, n.q_heads, n.q_len, start, n.batch, n.q_heads, n.q_len,
                     n.kv_len, end, end + cells, q.dtype, n.batch, n.q_heads, n.q_len, n.value_dim,
                     start, end);
            write_answer(folder, file, header, bytes, end + cells);
            free(bytes);
        }
        free(mask), free(out), free(lse);
    }
    free(method), free(with), free(rows), free(first), free(file.header), free(file.bytes);
    return wrong > 0;
}

int main(int count, char **names) {
    int first = 1, wrong = 0;
    const char *folder = NULL;
    if (count > 2 && !strcmp(names[1], "-o")) folder = names[2], first = 3;
    if (first >= count) fail("usage", "sliding [-o ANSWERS] VECTOR...");
    for (int i = first; i < count; i++) wrong += check(names[i], folder);
    printf("%d vectors, %d wrong\n", count - first, wrong);
    return wrong > 0;
}
