// Sending a packet on to a backend.
#pragma once

static __always_inline int set_ethernet(struct __sk_buff *skb, const struct backend *backend, __u16 protocol)
{
    struct ethhdr ethernet;
    __builtin_memcpy(ethernet.h_dest, backend->to_mac, 12); // to_mac and from_mac lie as they do in the header
    ethernet.h_proto = protocol;
    return bpf_skb_store_bytes(skb, 0, &ethernet, sizeof(ethernet), 0);
}

static __always_inline int v4_mapped(const struct address *address)
{
    return !address->word[0] && !address->word[1] && address->word[2] == bpf_htonl(0xffff);
}

// Puts the packet into a packet to the backend's own address: IP in IP (RFC 2003), IPv6 in IPv4 (RFC 4213), either
// in IPv6 (RFC 2473).
static __always_inline int wrap(struct __sk_buff *skb, const struct backend *backend, __u32 family)
{
    __u8 inner = family == bpf_htons(ETH_P_IP) ? IPPROTO_IPIP : IPPROTO_IPV6;
    __u32 inner_size = skb->len - ETHERNET;
    if (v4_mapped(&backend->outer_destination)) {
        if (bpf_skb_adjust_room(skb, sizeof(struct iphdr), BPF_ADJ_ROOM_MAC, BPF_F_ADJ_ROOM_ENCAP_L3_IPV4))
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
        if (bpf_skb_store_bytes(skb, ETHERNET, &ip, sizeof(ip), 0))
            return -1;
        return set_ethernet(skb, backend, bpf_htons(ETH_P_IP));
    }
    if (bpf_skb_adjust_room(skb, sizeof(struct ipv6hdr), BPF_ADJ_ROOM_MAC, BPF_F_ADJ_ROOM_ENCAP_L3_IPV6))
        return -1;
    struct ipv6hdr ip6 = {
        .version = 6,
        .payload_len = bpf_htons(inner_size),
        .nexthdr = inner,
        .hop_limit = 64,
    };
    __builtin_memcpy(&ip6.saddr, &backend->outer_source, 16);
    __builtin_memcpy(&ip6.daddr, &backend->outer_destination, 16);
    if (bpf_skb_store_bytes(skb, ETHERNET, &ip6, sizeof(ip6), 0))
        return -1;
    return set_ethernet(skb, backend, bpf_htons(ETH_P_IPV6));
}

// To the backend with this number, if it is one that gets packets.
__noinline int forward(struct __sk_buff *skb, __u32 family, __u32 number)
{
    struct backend *backend = bpf_map_lookup_elem(&backends, &number);
    if (!backend || !(backend->flags & BACKEND_LIVE)) {
        count(NO_BACKEND);
        return TC_ACT_SHOT;
    }
    struct traffic *mine = bpf_map_lookup_elem(&traffic, &number);
    if (mine) {
        mine->packets += 1;
        mine->bytes += skb->len;
    }
    if (backend->flags & BACKEND_TUNNEL) {
        if (wrap(skb, backend, family))
            return TC_ACT_SHOT;
    } else if (bpf_skb_store_bytes(skb, 0, backend->to_mac, 12, 0)) {
        return TC_ACT_SHOT;
    }
    return bpf_redirect(backend->ifindex, 0);
}
