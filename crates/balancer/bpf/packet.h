// From a packet's bytes to what the balancer decides on.
#pragma once

#define ETHERNET 14
#define IP_FRAGMENT 0x3fff // offset and "more fragments" of iphdr.frag_off
#define IP_OFFSET 0x1fff

struct packet {
    struct tuple tuple;
    __u32 l4;       // where the transport header begins
    __u32 protocol; // of it
    __u32 fragment; // 0: whole, 1: the first, 2: a later one
    __u32 fragment_id;
    __u32 family; // ETH_P_IP or ETH_P_IPV6
    __u32 sequence;     // TCP's
    __u8 offset, flags; // TCP's: the byte with its header's length, and its flags
};

#define TCP_FIN 1
#define TCP_SYN 2
#define TCP_RST 4
#define TCP_ACK 16

static __always_inline int opens(const struct packet *packet)
{
    return (packet->flags & (TCP_SYN | TCP_ACK | TCP_RST)) == TCP_SYN;
}

// Of the TCP header, with its options.
static __always_inline __u32 header_size(const struct packet *packet)
{
    return (packet->offset >> 4) * 4;
}

static __always_inline void map_v4(struct address *address, __u32 v4)
{
    address->word[0] = 0;
    address->word[1] = 0;
    address->word[2] = bpf_htonl(0xffff);
    address->word[3] = v4;
}

// TCP in IPv4 without options or in IPv6 without extension headers, in one piece, which is nearly all there is. 0 where the
// packet is another, or its headers are not where a program can look at them directly.
static __always_inline int read_plain(context *ctx, struct packet *packet)
{
    void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
    struct ethhdr *ethernet = data;
    struct iphdr *ip = data + ETHERNET;
    struct ipv6hdr *ip6 = data + ETHERNET;
    struct tcphdr *tcp = (void *)(ip + 1);
    if ((void *)(tcp + 1) > end || tag_taken_off(ctx))
        return 0;
    if (ethernet->h_proto == bpf_htons(ETH_P_IP)) {
        if (ip->version != 4 || ip->ihl != 5 || ip->protocol != IPPROTO_TCP || ip->frag_off & bpf_htons(IP_FRAGMENT))
            return 0;
        map_v4(&packet->tuple.source, ip->saddr);
        map_v4(&packet->tuple.destination, ip->daddr);
    } else if (ethernet->h_proto == bpf_htons(ETH_P_IPV6)) {
        tcp = (void *)(ip6 + 1);
        if ((void *)(tcp + 1) > end || ip6->version != 6 || ip6->nexthdr != IPPROTO_TCP)
            return 0;
        __builtin_memcpy(&packet->tuple.source, &ip6->saddr, 16);
        __builtin_memcpy(&packet->tuple.destination, &ip6->daddr, 16);
    } else {
        return 0;
    }
    packet->l4 = (void *)tcp - data;
    packet->protocol = IPPROTO_TCP;
    packet->fragment = packet->fragment_id = 0;
    packet->family = ethernet->h_proto;
    packet->tuple.source_port = tcp->source;
    packet->tuple.destination_port = tcp->dest;
    packet->sequence = bpf_ntohl(tcp->seq);
    packet->offset = ((__u8 *)tcp)[12];
    packet->flags = ((__u8 *)tcp)[13];
    return 1;
}

// The IP header at `l3`; ports are not read. 0, or the counter that says why not plus one.
__noinline int read_ip(context *ctx, __u32 l3, __u32 family, struct packet *packet)
{
    if (!packet)
        return TRUNCATED + 1;
    packet->family = family;
    packet->fragment = 0;
    packet->fragment_id = 0;
    if (family == bpf_htons(ETH_P_IP)) {
        struct iphdr ip;
        if (load_bytes(ctx, l3, &ip, sizeof(ip)) || ip.version != 4 || ip.ihl < 5)
            return TRUNCATED + 1;
        map_v4(&packet->tuple.source, ip.saddr);
        map_v4(&packet->tuple.destination, ip.daddr);
        packet->protocol = ip.protocol;
        packet->l4 = l3 + ip.ihl * 4;
        __u32 fragment = bpf_ntohs(ip.frag_off) & IP_FRAGMENT;
        if (fragment) {
            packet->fragment = fragment & IP_OFFSET ? 2 : 1;
            packet->fragment_id = ip.id;
        }
        return 0;
    }
    struct ipv6hdr ip6;
    if (load_bytes(ctx, l3, &ip6, sizeof(ip6)) || ip6.version != 6)
        return TRUNCATED + 1;
    __builtin_memcpy(&packet->tuple.source, &ip6.saddr, 16);
    __builtin_memcpy(&packet->tuple.destination, &ip6.daddr, 16);
    packet->l4 = l3 + sizeof(ip6);
    __u8 next = ip6.nexthdr;
    // Hop-by-hop options, routing, destination options and fragment (RFC 8200 section 4.1), in any order.
    for (int i = 0; i < 4; i++) {
        if (next != IPPROTO_HOPOPTS && next != IPPROTO_ROUTING && next != IPPROTO_DSTOPTS
            && next != IPPROTO_FRAGMENT)
            break;
        __u8 extension[8];
        if (load_bytes(ctx, packet->l4, extension, sizeof(extension)))
            return TRUNCATED + 1;
        if (next == IPPROTO_FRAGMENT) {
            __u32 offset = (__u32)extension[2] << 8 | extension[3];
            // An atomic fragment (offset 0, no more to come, RFC 6946) is a whole packet.
            if (offset & 0xfff9)
                packet->fragment = offset & 0xfff8 ? 2 : 1;
            __builtin_memcpy(&packet->fragment_id, extension + 4, 4);
            packet->l4 += 8;
        } else {
            packet->l4 += 8 + extension[1] * 8;
        }
        next = extension[0];
        if (packet->fragment == 2)
            break; // what follows is not a header
    }
    packet->protocol = next;
    if (next == IPPROTO_HOPOPTS || next == IPPROTO_ROUTING || next == IPPROTO_DSTOPTS)
        return packet->fragment == 2 ? 0 : IPV6_EXTENSION + 1;
    return 0;
}

// Which of a ring's places the packet's way belongs to. Every balancer hashes alike, so that any of several
// behind an ECMP router sends a connection to the same backend.
__noinline __u32 place_of(struct tuple *tuple)
{
    if (!tuple)
        return 0;
    __u64 hash = 0x9e3779b97f4a7c15;
    __u64 words[5];
    __builtin_memcpy(words, &tuple->source, 16);
    __builtin_memcpy(words + 2, &tuple->destination, 16);
    words[4] = (__u64)tuple->source_port << 16 | tuple->destination_port;
    for (int i = 0; i < 5; i++) {
        // The mixing steps of splitmix64.
        hash ^= words[i];
        hash = (hash ^ hash >> 30) * 0xbf58476d1ce4e5b9;
        hash = (hash ^ hash >> 27) * 0x94d049bb133111eb;
        hash ^= hash >> 31;
    }
    return hash % RING_SIZE;
}
