// What the programs ask of a packet, alike at TC ingress and, compiled with -DXDP, in a network driver.
#pragma once

#ifdef XDP
#define PROGRAM SEC("xdp.frags")
#define PASS XDP_PASS
#define DROP XDP_DROP
typedef struct xdp_md context;
#define load_bytes bpf_xdp_load_bytes
#define store_bytes bpf_xdp_store_bytes

static __always_inline __u32 length(context *ctx)
{
    return bpf_xdp_get_buff_len(ctx);
}

// Drivers leave a VLAN's tag in the frame.
static __always_inline int tag_taken_off(context *ctx)
{
    return 0;
}

// Makes room of `size` bytes for an outer IP header.
static __always_inline int make_room(context *ctx, __u32 size)
{
    return bpf_xdp_adjust_head(ctx, -(int)size);
}

static __always_inline int send_out(context *ctx, __u32 ifindex, __u32 peer)
{
    return ifindex == ctx->ingress_ifindex ? XDP_TX : bpf_redirect(ifindex, 0);
}
#else
#define PROGRAM SEC("classifier")
#define PASS TC_ACT_UNSPEC // to the next program, and then to the kernel
#define DROP TC_ACT_SHOT
typedef struct __sk_buff context;
#define load_bytes bpf_skb_load_bytes

static __always_inline int store_bytes(context *ctx, __u32 at, const void *from, __u32 size)
{
    return bpf_skb_store_bytes(ctx, at, from, size, 0);
}

static __always_inline __u32 length(context *ctx)
{
    return ctx->len;
}

static __always_inline int tag_taken_off(context *ctx)
{
    return ctx->vlan_present;
}

static __always_inline int make_room(context *ctx, __u32 size)
{
    // The kernel has to know what segments of a larger packet begin with.
    __u64 flags = size == sizeof(struct iphdr) ? BPF_F_ADJ_ROOM_ENCAP_L3_IPV4 : BPF_F_ADJ_ROOM_ENCAP_L3_IPV6;
    return bpf_skb_adjust_room(ctx, size, BPF_ADJ_ROOM_MAC, flags);
}

// `peer`: comes in on the interface's other end at once, with no way out through this one's queues.
static __always_inline int send_out(context *ctx, __u32 ifindex, __u32 peer)
{
    return peer ? bpf_redirect_peer(ifindex, 0) : bpf_redirect(ifindex, 0);
}
#endif
