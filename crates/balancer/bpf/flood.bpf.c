// For benches: a source of packets that costs next to nothing, and their sink.
#include <linux/bpf.h>
#include <linux/pkt_cls.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#define HEADERS 54 // Ethernet, IPv4, TCP
#define SOURCE_PORT 34

// What each packet begins with, and how many source ports take turns. Set before the program is loaded.
__u8 headers[HEADERS] = { 1 };
__u32 flows = 1;
__u32 sent = 0;

// In BPF_PROG_TEST_RUN with BPF_F_TEST_XDP_LIVE_FRAMES: the packets come in on an interface, as if from a network.
SEC("xdp")
int flood(struct xdp_md *ctx)
{
    void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
    if (data + HEADERS > end)
        return XDP_ABORTED;
    // A packet's memory comes back as the last one who had it left it.
    __builtin_memcpy(data, headers, HEADERS);
    *(__u16 *)(data + SOURCE_PORT) = bpf_htons(1024 + sent++ % flows);
    return XDP_PASS;
}

SEC("classifier")
int sink(struct __sk_buff *skb)
{
    return TC_ACT_SHOT;
}

char LICENSE[] SEC("license") = "Apache-2.0 OR MIT";
