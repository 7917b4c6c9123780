// MPTCP options of a TCP header (RFC 8684) and the token of a key.
#pragma once

#define OPTIONS_SIZE 64 // options are 40 bytes at most; a power of two bounds an index with one AND
#define KIND_MPTCP 30

struct options {
    __u8 byte[OPTIONS_SIZE];
};

struct key {
    __u8 byte[8];
};

// What was found, as a test reads it too (`src/inspect.rs`).
struct mptcp {
    __u32 flags;
    __u32 token;           // of MPTCP_JOIN_SYN, as on the wire
    struct key sender;     // of MPTCP_KEYS and MPTCP_SYNACK
    struct key receiver;   // of MPTCP_KEYS
    __u32 at;              // how far the options have been read
};
#define MPTCP_SYN 1       // MP_CAPABLE version 1 of a SYN: no key
#define MPTCP_SYNACK 2    // MP_CAPABLE version 1 with one key
#define MPTCP_KEYS 4      // MP_CAPABLE version 1 with both keys
#define MPTCP_JOIN_SYN 8  // MP_JOIN of a SYN
#define MPTCP_DSS 16
#define MPTCP_V0 32       // MP_CAPABLE version 0
#define MPTCP_MALFORMED 64

// An index that the verifier sees the bound of, whatever the compiler thinks to know.
static __always_inline __u32 bounded(__u32 index)
{
    asm volatile("%0 &= 63" : "+r"(index));
    return index;
}

// Reads `length` bytes of options. Not inlined: the verifier then looks at it once, not once for each caller.
__noinline int find_mptcp(struct options *options, __u32 length, struct mptcp *found)
{
    if (!options || !found)
        return 0;
    __builtin_memset(found, 0, sizeof(*found));
#pragma clang loop unroll(disable)
    for (int i = 0; i < 40; i++) {
        // In memory that the verifier does not follow: with each value that it may have in a register it would go
        // through the rest of the loop again.
        asm volatile("" ::: "memory");
        __u32 at = found->at;
        if (at >= length || at >= 40)
            break;
        __u32 kind = options->byte[bounded(at)];
        if (kind == 0)
            break;
        if (kind == 1) {
            found->at = at + 1;
            continue;
        }
        if (at + 1 >= length) {
            found->flags |= MPTCP_MALFORMED;
            break;
        }
        __u32 size = options->byte[bounded(at + 1)];
        if (size < 2 || at + size > length) {
            found->flags |= MPTCP_MALFORMED;
            break;
        }
        if (kind == KIND_MPTCP && size >= 4) {
            __u32 head = options->byte[bounded(at + 2)];
            __u32 subtype = head >> 4, version = head & 15;
            if (subtype == 0 && version == 0 && (size == 12 || size == 20)) {
                found->flags |= MPTCP_V0;
            } else if (subtype == 0 && version == 1) {
                if (size == 4)
                    found->flags |= MPTCP_SYN;
                // 20: the third ACK; 22 and 24: with data, and its checksum
                if (size == 12 || size == 20 || size == 22 || size == 24) {
                    found->flags |= size == 12 ? MPTCP_SYNACK : MPTCP_KEYS;
                    for (int k = 0; k < 8; k++) {
                        found->sender.byte[k] = options->byte[bounded(at + 4 + k)];
                        found->receiver.byte[k] = size == 12 ? 0 : options->byte[bounded(at + 12 + k)];
                    }
                }
            } else if (subtype == 1 && size == 12) {
                found->flags |= MPTCP_JOIN_SYN;
                __u32 token = 0;
                for (int k = 0; k < 4; k++)
                    token = token << 8 | options->byte[bounded(at + 4 + k)];
                found->token = bpf_htonl(token);
            } else if (subtype == 2) {
                found->flags |= MPTCP_DSS;
            }
        }
        found->at = at + size;
    }
    return 0;
}

static const __u32 sha256_k[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

static __always_inline __u32 rotate(__u32 x, int by)
{
    return x >> by | x << (32 - by);
}

// The token of a key: the first 32 bits of its SHA-256 (RFC 8684 section 3.2; FIPS 180-4), as on the wire.
__noinline __u32 token_of(struct key *key)
{
    if (!key)
        return 0;
    // The one block that eight bytes, padded, make. Of the message schedule only the last 16 words are needed.
    __u32 w[16] = {};
    for (int i = 0; i < 2; i++)
        w[i] = (__u32)key->byte[4 * i] << 24 | (__u32)key->byte[4 * i + 1] << 16
             | (__u32)key->byte[4 * i + 2] << 8 | key->byte[4 * i + 3];
    w[2] = 0x80000000;
    w[15] = 64;
    __u32 a = 0x6a09e667, b = 0xbb67ae85, c = 0x3c6ef372, d = 0xa54ff53a;
    __u32 e = 0x510e527f, f = 0x9b05688c, g = 0x1f83d9ab, h = 0x5be0cd19;
#pragma clang loop unroll(disable)
    for (__u32 i = 0; i < 64; i++) {
        __u32 word = w[i & 15];
        if (i >= 16) {
            __u32 w15 = w[(i + 1) & 15], w2 = w[(i + 14) & 15];
            word += (rotate(w15, 7) ^ rotate(w15, 18) ^ w15 >> 3) + w[(i + 9) & 15]
                  + (rotate(w2, 17) ^ rotate(w2, 19) ^ w2 >> 10);
            w[i & 15] = word;
        }
        __u32 t1 = h + (rotate(e, 6) ^ rotate(e, 11) ^ rotate(e, 25)) + ((e & f) ^ (~e & g))
                 + sha256_k[i & 63] + word;
        __u32 t2 = (rotate(a, 2) ^ rotate(a, 13) ^ rotate(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
        h = g;
        g = f;
        f = e;
        e = d + t1;
        d = c;
        c = b;
        b = a;
        a = t1 + t2;
    }
    return bpf_htonl(0x6a09e667 + a);
}
