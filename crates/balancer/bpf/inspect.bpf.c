// For tests: what the option parser and the token function make of bytes. The packet is a length byte and options;
// what was found is written over its start, with the token of the receiver's key in place of `at`.
#include <linux/bpf.h>
#include <linux/pkt_cls.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "mptcp.h"

#define ETHERNET 14 // BPF_PROG_TEST_RUN wants a whole Ethernet header

SEC("classifier")
int inspect(struct __sk_buff *skb)
{
    struct options options = {};
    struct mptcp found;
    __u8 length;
    if (bpf_skb_load_bytes(skb, ETHERNET, &length, 1) || length > 40
        || bpf_skb_load_bytes(skb, ETHERNET + 1, &options, 40))
        return TC_ACT_SHOT;
    find_mptcp(&options, length, &found);
    found.at = token_of(&found.receiver);
    if (bpf_skb_store_bytes(skb, 0, &found, sizeof(found), 0))
        return TC_ACT_SHOT;
    return TC_ACT_OK;
}

char LICENSE[] SEC("license") = "Apache-2.0 OR MIT";
