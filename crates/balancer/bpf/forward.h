// Sending a packet on to a backend.
#pragma once

static __always_inline int set_ethernet(context *ctx, const struct backend *backend, __u16 protocol)
{
    struct ethhdr ethernet;
    __builtin_memcpy(ethernet.h_dest, backend->to_mac, 12); // to_mac and from_mac lie as they do in the header
    ethernet.h_proto = protocol;
    return store_bytes(ctx, 0, &ethernet, sizeof(ethernet));
}

static __always_inline int v4_mapped(const struct address *address)
{
    return !address->word[0] && !address->word[1] && address->word[2] == bpf_htonl(0xffff);
}

// Puts the packet into a packet to the backend's own address: IP in IP (RFC 2003), IPv6 in IPv4 (RFC 4213), either
// in IPv6 (RFC 2473).
__noinline int wrap(context *ctx, __u32 family, __u32 number)
{
    struct backend *backend = bpf_map_lookup_elem(&backends, &number);
    if (!backend)
        return -1;
    __u8 inner = family == bpf_htons(ETH_P_IP) ? IPPROTO_IPIP : IPPROTO_IPV6;
    __u32 inner_size = length(ctx) - ETHERNET;
    if (v4_mapped(&backend->outer_destination)) {
        if (make_room(ctx, sizeof(struct iphdr)))
            return -1;
        struct iphdr ip = {
            .version = 4,
            .ihl = 5,
            .tot_len = bpf_htons(inner_size + sizeof(ip)),
            .ttl = 64,
            .protocol = inner,
            .saddr = backend->outer_source.word[3],
            .daddr = backend->outer_destination.word[3],
        };
        __u32 sum = bpf_csum_diff(0, 0, (__be32 *)&ip, sizeof(ip), 0);
        sum = (sum & 0xffff) + (sum >> 16);
        sum = (sum & 0xffff) + (sum >> 16);
        ip.check = ~sum;
        if (store_bytes(ctx, ETHERNET, &ip, sizeof(ip)))
            return -1;
        return set_ethernet(ctx, backend, bpf_htons(ETH_P_IP));
    }
    if (make_room(ctx, sizeof(struct ipv6hdr)))
        return -1;
    struct ipv6hdr ip6 = {
        .version = 6,
        .payload_len = bpf_htons(inner_size),
        .nexthdr = inner,
        .hop_limit = 64,
    };
    __builtin_memcpy(&ip6.saddr, &backend->outer_source, 16);
    __builtin_memcpy(&ip6.daddr, &backend->outer_destination, 16);
    if (store_bytes(ctx, ETHERNET, &ip6, sizeof(ip6)))
        return -1;
    return set_ethernet(ctx, backend, bpf_htons(ETH_P_IPV6));
}

// To this backend, which has this number and gets packets.
static __always_inline int send(context *ctx, __u32 family, const struct backend *backend, __u32 number)
{
    struct traffic *mine = bpf_map_lookup_elem(&traffic, &number);
    if (mine) {
        mine->packets += 1;
        mine->bytes += length(ctx);
    }
    if (backend->flags & BACKEND_TUNNEL) {
        if (wrap(ctx, family, number))
            return DROP;
    } else {
        void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
        if (data + ETHERNET > end)
            return DROP;
        __builtin_memcpy(data, backend->to_mac, 12);
    }
    return send_out(ctx, backend->ifindex, backend->flags & BACKEND_PEER);
}

// To the backend with this number, if it is one that gets packets.
__noinline int forward(context *ctx, __u32 family, __u32 number)
{
    struct backend *backend = bpf_map_lookup_elem(&backends, &number);
    if (!backend || !(backend->flags & BACKEND_LIVE)) {
        count(NO_BACKEND);
        return DROP;
    }
    return send(ctx, family, backend, number);
}
