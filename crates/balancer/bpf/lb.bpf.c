// The balancer's data plane: a packet to a service goes to the backend that has its connection.
//
//   parse -> flow table | fresh flows | (SYN: token table | Maglev ring) -> redirect
//
// What is not for a service is passed on to the kernel untouched.
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/in6.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/pkt_cls.h>
#include <linux/tcp.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

// Functions that are not static are global ones for the verifier: it looks at each once, whoever calls it. All in one
// this program would be too much for it.
#include "maps.h"
#include "context.h"
#include "mptcp.h"
#include "packet.h"
#include "forward.h"

// BPF_F_ADJ_ROOM_DECAP_L3_IPV4 and _IPV6, which Debian 12's linux/bpf.h does not know yet.
#define DECAP_IPV4 (1 << 7)
#define DECAP_IPV6 (1 << 8)

// A SYN for a flow that has been silent for so long is a new connection from the same port. A younger flow keeps
// its backend: else anybody could break it by a SYN with a forged source.
#define REUSE_SECONDS 60
// The same after a FIN: until the other side has sent its own, it may go on for long.
#define CLOSING_SECONDS 2
// A FIN or RST counts only with a sequence number that is no farther than this from the packet before, so that one who does
// not see the flow has to send thousands. Segments that the kernel has put together are up to half as long.
#define NEAR (1 << 20)

static __always_inline __u32 now(void)
{
    return bpf_ktime_get_coarse_ns() / 1000000000;
}

static __always_inline __u16 this_tick(void)
{
    return bpf_jiffies64() >> 5 | 1;
}

static __always_inline struct flow new_flow(const struct packet *packet, __u32 number, __u16 flags)
{
    struct flow flow = { .backend = number, .seen = now(), .flags = flags, .tick = this_tick() };
    flow.sequence = packet->sequence;
    return flow;
}

static __always_inline void touch(struct flow *flow, const struct packet *packet)
{
    if (!flow->tick)
        flow->sequence = packet->sequence;
    // Asking for the time costs more than looking at the ticks whether there is a new one.
    __u16 tick = this_tick();
    if (flow->tick != tick) {
        flow->tick = tick;
        flow->seen = now();
    }
    if (packet->sequence - flow->sequence + NEAR > 2 * NEAR)
        return;
    flow->sequence = packet->sequence;
    if (packet->flags & TCP_FIN)
        flow->flags |= FLOW_FINISHED;
    if (packet->flags & TCP_RST)
        flow->flags |= FLOW_RESET;
}

// May a SYN with the flow's addresses begin another?
static __always_inline int is_over(const struct flow *flow)
{
    __u32 silent = now() - flow->seen;
    return flow->flags & FLOW_RESET || silent >= (flow->flags & FLOW_FINISHED ? CLOSING_SECONDS : REUSE_SECONDS);
}

// Has the backend with this number the flag?
__noinline int is(__u32 number, __u32 flag)
{
    struct backend *backend = bpf_map_lookup_elem(&backends, &number);
    return backend && backend->flags & flag;
}

__noinline __u32 from_ring(__u32 service, struct tuple *tuple)
{
    void *ring = bpf_map_lookup_elem(&rings, &service);
    if (!ring)
        return 0;
    __u32 place = place_of(tuple);
    __u32 *number = bpf_map_lookup_elem(ring, &place);
    return number ? *number : 0;
}

static __always_inline struct service *find_service(const struct address *address, __u16 port)
{
    struct service_key key = { .address = *address, .port = port };
    return bpf_map_lookup_elem(&services, &key);
}

__noinline int read_options(context *ctx, struct packet *packet, struct mptcp *found)
{
    if (!packet || !found)
        return 0;
    struct options options = {};
    __u32 size = header_size(packet);
    size = bounded(size > 20 ? size - 20 : 0);
    if (size == 0 || load_bytes(ctx, packet->l4 + 20, &options, size))
        size = 0;
    find_mptcp(&options, size, found);
    if (found->flags & MPTCP_MALFORMED)
        count(MALFORMED_OPTIONS);
    return 0;
}

// The connection with the server's `key` is on this backend.
__noinline int learn(struct key *key, __u32 service, __u32 number, struct address *client)
{
    if (!key || !client)
        return 0;
    struct token_key at = { .token = token_of(key), .service = service };
    struct token *known = bpf_map_lookup_elem(&tokens, &at);
    count(TOKENS_LEARNED);
    if (known && known->slot[0].backend == number)
        return 0;
    struct token token = { .slot[0] = { .backend = number, .client = *client } };
    if (known) {
        token.slot[1] = known->slot[0];
        count(TOKEN_COLLISIONS);
    } else {
        count(TOKENS_ADDED);
    }
    bpf_map_update_elem(&tokens, &at, &token, BPF_ANY);
    return 0;
}

__noinline __u32 by_token(__u32 service, __u32 token, struct address *client)
{
    if (!client)
        return 0;
    struct token_key at = { .token = token, .service = service };
    struct token *known = bpf_map_lookup_elem(&tokens, &at);
    if (!known)
        return 0;
    // Of two connections the one from this client, else the newer.
    struct token_slot *other = &known->slot[1];
    if (other->backend && other->client.word[3] == client->word[3] && other->client.word[0] == client->word[0]
        && other->client.word[1] == client->word[1] && other->client.word[2] == client->word[2]
        && is(other->backend, BACKEND_LIVE))
        return other->backend;
    return is(known->slot[0].backend, BACKEND_LIVE) ? known->slot[0].backend : other->backend;
}

static __always_inline void add(void *map, __u32 counter, struct tuple *tuple, struct flow *flow)
{
    // Written in place where it is there: an update would take another entry of the table for it.
    struct flow *there = bpf_map_lookup_elem(map, tuple);
    if (there)
        *there = *flow;
    else if (bpf_map_update_elem(map, tuple, flow, BPF_NOEXIST) == 0)
        count(counter);
}

__noinline int add_flow(struct tuple *tuple, struct flow *flow)
{
    if (tuple && flow)
        add(&flows, FLOWS_ADDED, tuple, flow);
    return 0;
}

__noinline int add_fresh(struct tuple *tuple, struct flow *flow)
{
    if (tuple && flow)
        add(&fresh, FRESH_ADDED, tuple, flow);
    return 0;
}

// Later fragments have no ports: they follow the first.
__noinline int remember_fragment(struct packet *packet, __u32 number)
{
    if (!packet)
        return 0;
    struct fragment_key key = {
        .source = packet->tuple.source,
        .destination = packet->tuple.destination,
        .id = packet->fragment_id,
        .protocol = packet->protocol,
    };
    bpf_map_update_elem(&fragments, &key, &number, BPF_ANY);
    return 0;
}

__noinline int later_fragment(context *ctx, struct packet *packet)
{
    if (!packet)
        return PASS;
    struct fragment_key key = {
        .source = packet->tuple.source,
        .destination = packet->tuple.destination,
        .id = packet->fragment_id,
        .protocol = packet->protocol,
    };
    __u32 *number = bpf_map_lookup_elem(&fragments, &key);
    if (!number) {
        count(FRAGMENT_UNKNOWN);
        return PASS;
    }
    count(FRAGMENTS_DELIVERED);
    return forward(ctx, packet->family, *number);
}

// An ICMP error about a packet that a backend sent: its sender is the flow's backend.
__noinline int icmp_error(context *ctx, struct packet *outer)
{
    struct packet inner = {};
    if (!outer)
        return PASS;
    if (read_ip(ctx, outer->l4 + 8, outer->family, &inner) || inner.protocol != IPPROTO_TCP || inner.fragment == 2)
        return PASS;
    __u16 ports[2];
    if (load_bytes(ctx, inner.l4, ports, sizeof(ports)))
        return PASS;
    struct tuple tuple = {
        .source = inner.tuple.destination,
        .destination = inner.tuple.source,
        .source_port = ports[1],
        .destination_port = ports[0],
    };
    struct service *service = find_service(&tuple.destination, tuple.destination_port);
    if (!service)
        return PASS;
    __u32 number = 0;
    struct flow *flow = bpf_map_lookup_elem(&flows, &tuple);
    if (!flow)
        flow = bpf_map_lookup_elem(&fresh, &tuple);
    if (service->flags & SERVICE_FIXED)
        number = service->backend;
    else if (flow)
        number = flow->backend;
    else
        number = from_ring(service->id, &tuple);
    if (!is(number, BACKEND_LIVE)) {
        count(ICMP_UNKNOWN);
        return DROP;
    }
    count(ICMP_DELIVERED);
    return forward(ctx, outer->family, number);
}

static __always_inline int is_icmp_error(__u32 protocol, __u8 type)
{
    if (protocol == IPPROTO_ICMP)
        return type == 3 || type == 11 || type == 12; // RFC 792
    return protocol == IPPROTO_ICMPV6 && type >= 1 && type <= 4; // RFC 4443
}

// Where the way back passes here too: the server's SYN/ACK has its key, earlier than the client's answer.
__noinline int way_back(context *ctx, struct packet *packet)
{
    if (!packet)
        return PASS;
    struct tuple tuple = {
        .source = packet->tuple.destination,
        .destination = packet->tuple.source,
        .source_port = packet->tuple.destination_port,
        .destination_port = packet->tuple.source_port,
    };
    struct service *service = find_service(&tuple.destination, tuple.destination_port);
    if (!service || !(service->flags & SERVICE_TOKEN))
        return PASS;
    struct flow *flow = bpf_map_lookup_elem(&fresh, &tuple);
    if (!flow || !(flow->flags & FLOW_KEY_TO_COME))
        return PASS;
    struct mptcp found;
    read_options(ctx, packet, &found);
    if (found.flags & MPTCP_SYNACK)
        learn(&found.sender, service->id, flow->backend, &tuple.source);
    return PASS;
}

// A SYN: a new connection or a join.
__noinline int open(context *ctx, struct packet *packet)
{
    if (!packet)
        return PASS;
    struct tuple tuple = packet->tuple;
    struct service *service = find_service(&tuple.destination, tuple.destination_port);
    if (!service)
        return PASS;
    struct flow *known = bpf_map_lookup_elem(&flows, &tuple);
    struct mptcp found = {};
    read_options(ctx, packet, &found);
    __u32 number = 0, join = found.flags & MPTCP_JOIN_SYN;
    if (service->flags & SERVICE_FIXED) {
        number = service->backend;
    } else if (known && !is_over(known) && is(known->backend, BACKEND_LIVE)) {
        // Where it is a new connection all the same, its key will come.
        if (found.flags & MPTCP_SYN && service->flags & SERVICE_TOKEN)
            known->flags |= FLOW_KEY_TO_COME;
        return forward(ctx, packet->family, known->backend);
    } else if (join && service->flags & SERVICE_TOKEN) {
        number = by_token(service->id, found.token, &tuple.source);
        if (!is(number, BACKEND_LIVE)) {
            count(JOIN_TOKEN_UNKNOWN);
            return DROP;
        }
        struct flow flow = new_flow(packet, number, FLOW_SYN_SEEN);
        add_flow(&tuple, &flow);
    } else {
        // A repeated SYN goes where the first went, also when the ring has changed meanwhile.
        struct flow *before = bpf_map_lookup_elem(&fresh, &tuple);
        number = before && is(before->backend, BACKEND_TAKES) ? before->backend : from_ring(service->id, &tuple);
        struct flow flow = new_flow(packet, number, FLOW_SYN_SEEN);
        if (found.flags & MPTCP_SYN && service->flags & SERVICE_TOKEN)
            flow.flags |= FLOW_KEY_TO_COME;
        if (number)
            add_fresh(&tuple, &flow);
        if (known && bpf_map_delete_elem(&flows, &tuple) == 0)
            count(FLOWS_REMOVED);
    }
    if (found.flags & MPTCP_V0)
        count(MPTCP_VERSION_0);
    struct traffic *mine = bpf_map_lookup_elem(&traffic, &number);
    if (mine) {
        if (!join && found.flags & (MPTCP_SYN | MPTCP_V0))
            mine->connections += 1;
        else if (!join)
            mine->plain += 1;
        else if (service->flags & SERVICE_FIXED)
            mine->joins_by_port += 1;
        else if (service->flags & SERVICE_TOKEN)
            mine->joins_by_token += 1;
        else
            mine->joins_by_hash += 1;
    }
    if (packet->fragment)
        remember_fragment(packet, number);
    return forward(ctx, packet->family, number);
}

// A packet without SYN for which the flow table alone is not enough: the flow's first ones, or one that nobody knows.
// The backend's number, 0 for none, or -1 where it is for no service.
__noinline int find_backend(context *ctx, struct packet *packet)
{
    if (!packet)
        return -1;
    struct tuple tuple = packet->tuple;
    struct service *service = find_service(&tuple.destination, tuple.destination_port);
    if (!service)
        return -1;
    if (service->flags & SERVICE_FIXED)
        return service->backend;
    struct flow *flow = bpf_map_lookup_elem(&flows, &tuple);
    if (!flow) {
        flow = bpf_map_lookup_elem(&fresh, &tuple);
        if (flow && flow->flags & FLOW_SYN_SEEN) {
            struct flow moved = *flow;
            add_flow(&tuple, &moved);
            if (bpf_map_delete_elem(&fresh, &tuple) == 0)
                count(FRESH_REMOVED);
            flow = bpf_map_lookup_elem(&flows, &tuple);
        }
    }
    if (!flow || !is(flow->backend, BACKEND_LIVE)) {
        // Another balancer's, or older than this one.
        __u32 number = from_ring(service->id, &tuple);
        struct flow picked_up = new_flow(packet, number, 0);
        count(PICKED_UP);
        if (number)
            add_fresh(&tuple, &picked_up);
        return number;
    }
    touch(flow, packet);
    if (flow->flags & FLOW_KEY_TO_COME) {
        struct mptcp found = {};
        read_options(ctx, packet, &found);
        if (found.flags & MPTCP_KEYS)
            learn(&found.receiver, service->id, flow->backend, &tuple.source);
        // The first packet without SYN has the keys (RFC 8684 section 3.1), but may get lost before it comes here;
        // those with data repeat them until the server has confirmed. Then come DSS, or nothing after a fallback.
        if (found.flags & (MPTCP_KEYS | MPTCP_DSS) || length(ctx) > packet->l4 + header_size(packet))
            flow->flags &= ~FLOW_KEY_TO_COME;
    }
    return flow->backend;
}

// All of TCP but whole packets of established flows.
__noinline int steer(context *ctx, struct packet *packet)
{
    if (!packet)
        return PASS;
    if (opens(packet))
        return open(ctx, packet);
    int number = find_backend(ctx, packet);
    if (number < 0) {
        if ((packet->flags & (TCP_SYN | TCP_ACK)) == (TCP_SYN | TCP_ACK))
            return way_back(ctx, packet);
        return PASS;
    }
    if (packet->fragment)
        remember_fragment(packet, number);
    return forward(ctx, packet->family, number);
}

// A packet that is not plain.
__noinline int read_on(context *ctx)
{
    __u16 family;
    if (load_bytes(ctx, ETHERNET - 2, &family, sizeof(family)))
        return PASS;
    if (tag_taken_off(ctx) || family == bpf_htons(ETH_P_8021Q) || family == bpf_htons(ETH_P_8021AD)) {
        // The interface of the VLAN gets its packets without a tag: that is where the balancer belongs.
        count(VLAN);
        return PASS;
    }
    if (family != bpf_htons(ETH_P_IP) && family != bpf_htons(ETH_P_IPV6))
        return PASS;
    struct packet packet = {};
    int problem = read_ip(ctx, ETHERNET, family, &packet);
    if (problem) {
        count(problem - 1);
        return PASS;
    }
    if (packet.fragment == 2)
        return packet.protocol == IPPROTO_TCP ? later_fragment(ctx, &packet) : PASS;
    if (packet.protocol != IPPROTO_TCP) {
        __u8 type;
        if (load_bytes(ctx, packet.l4, &type, 1) || !is_icmp_error(packet.protocol, type))
            return PASS;
        return icmp_error(ctx, &packet);
    }
    struct {
        __u16 source, destination;
        __u32 sequence, acknowledgement;
        __u8 offset, flags;
        __u16 window;
        __u32 rest;
    } tcp;
    if (load_bytes(ctx, packet.l4, &tcp, sizeof(tcp))) {
        count(TRUNCATED);
        return PASS;
    }
    packet.tuple.source_port = tcp.source;
    packet.tuple.destination_port = tcp.destination;
    packet.sequence = bpf_ntohl(tcp.sequence);
    packet.offset = tcp.offset;
    packet.flags = tcp.flags;
    return steer(ctx, &packet);
}

PROGRAM
int balance(context *ctx)
{
    struct packet packet;
    if (!read_plain(ctx, &packet))
        return read_on(ctx);
    // Established flows pay for one look into the flow table, and for no call that can be avoided.
    if (!opens(&packet)) {
        struct flow *flow = bpf_map_lookup_elem(&flows, &packet.tuple);
        if (flow && !(flow->flags & FLOW_KEY_TO_COME)) {
            __u32 number = flow->backend;
            struct backend *backend = bpf_map_lookup_elem(&backends, &number);
            if (backend && backend->flags & BACKEND_LIVE) {
                touch(flow, &packet);
                return send(ctx, packet.family, backend, number);
            }
        }
    }
    return steer(ctx, &packet);
}

#ifndef XDP
// A backend's side of the tunnel: takes the outer header off. For kernels without ipip and sit.
SEC("classifier")
int unwrap(context *ctx)
{
    __u32 family = ctx->protocol;
    struct packet outer = {};
    if (family != bpf_htons(ETH_P_IP) && family != bpf_htons(ETH_P_IPV6))
        return PASS;
    if (read_ip(ctx, ETHERNET, family, &outer) || outer.fragment)
        return PASS;
    if (outer.protocol != IPPROTO_IPIP && outer.protocol != IPPROTO_IPV6)
        return PASS;
    if (!bpf_map_lookup_elem(&tunnel_peers, &outer.tuple.source))
        return PASS;
    __u64 flags = outer.protocol == IPPROTO_IPIP ? DECAP_IPV4 : DECAP_IPV6;
    __u16 inner = outer.protocol == IPPROTO_IPIP ? bpf_htons(ETH_P_IP) : bpf_htons(ETH_P_IPV6);
    __s32 header = (__s32)(outer.l4 - ETHERNET);
    if (header != sizeof(struct iphdr) && header != sizeof(struct ipv6hdr))
        return PASS;
    if (bpf_skb_adjust_room(ctx, -header, BPF_ADJ_ROOM_MAC, flags))
        return DROP;
    if (store_bytes(ctx, ETHERNET - 2, &inner, sizeof(inner)))
        return DROP;
    return PASS;
}
#endif

char LICENSE[] SEC("license") = "Apache-2.0 OR MIT";
