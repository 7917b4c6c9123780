// What the programs and the control plane share: structs and maps. `src/abi.rs` says the same in Rust.
// Pinned maps are taken over by later versions: what is in them keeps its meaning, or its map gets another size or name.
// Addresses are IPv6; an IPv4 address is ::ffff:a.b.c.d. Addresses and ports are in network byte order.
#pragma once

struct address {
    __u32 word[4];
};

// A packet's way: from a client to a service.
struct tuple {
    struct address source, destination;
    __u16 source_port, destination_port;
};

struct service_key {
    struct address address;
    __u16 port, unused;
};

// One address and port of a service. `id` names the service: its ring, and whose tokens count.
struct service {
    __u32 id;
    __u32 flags;
    __u32 backend; // where SERVICE_FIXED says so
};
#define SERVICE_TOKEN 1 // joins go by token
#define SERVICE_FIXED 2 // everything goes to one backend: the announced port of the port scheme

struct backend {
    __u8 to_mac[6], from_mac[6];
    __u32 ifindex;
    __u32 flags;
    struct address outer_source, outer_destination; // where BACKEND_TUNNEL says so
};
#define BACKEND_LIVE 1   // gets the packets of its flows
#define BACKEND_TAKES 2  // gets new connections
#define BACKEND_TUNNEL 4 // behind a router: IP in IP
#define BACKEND_PEER 32  // its interface is a veth whose other end is in another network namespace
// 8 and 16 are the control plane's: in the configuration; draining

struct flow {
    __u32 backend;
    __u32 seen; // seconds since boot, of the last packet
    __u16 flags;
    __u16 tick;     // when `seen` was written; 0: `sequence` is not known
    __u32 sequence; // of the last packet, where that was near the one before
};
#define FLOW_KEY_TO_COME 1 // began with MP_CAPABLE; the packet with both keys has not passed
#define FLOW_SYN_SEEN 2
#define FLOW_FINISHED 4 // the client sent FIN
#define FLOW_RESET 8    // the client sent RST

struct token_key {
    __u32 token, service;
};

// Two connections with the same token, on two backends: the client's address tells them apart.
struct token_slot {
    __u32 backend; // 0: empty
    struct address client;
};

struct token {
    struct token_slot slot[2]; // the newer one first
};

struct fragment_key {
    struct address source, destination;
    __u32 id, protocol;
};

struct traffic {
    __u64 packets, bytes;
    __u64 connections;    // opened with MP_CAPABLE
    __u64 plain;          // opened without
    __u64 joins_by_token; // SYNs with MP_JOIN, by what sent them here
    __u64 joins_by_port;
    __u64 joins_by_hash;
};

#define RING_SIZE 65537
#define MAX_SERVICES 256
#define MAX_BACKENDS 1024 // all services together; number 0 is nobody
#define NAME_SIZE 128

struct name {
    char text[NAME_SIZE];
};

struct {
    __uint(type, BPF_MAP_TYPE_HASH);
    __type(key, struct service_key);
    __type(value, struct service);
    __uint(max_entries, 4096);
} services SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_ARRAY);
    __type(key, __u32);
    __type(value, struct backend);
    __uint(max_entries, MAX_BACKENDS);
} backends SEC(".maps");

// Which service and backend a number is: `web/app-1`. For the control plane alone.
struct {
    __uint(type, BPF_MAP_TYPE_ARRAY);
    __type(key, __u32);
    __type(value, struct name);
    __uint(max_entries, MAX_BACKENDS);
} backend_names SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_ARRAY);
    __type(key, __u32);
    __type(value, struct name);
    __uint(max_entries, MAX_SERVICES);
} service_names SEC(".maps");

// A service's Maglev ring: replacing the inner map changes it in one moment.
struct ring {
    __uint(type, BPF_MAP_TYPE_ARRAY);
    __type(key, __u32);
    __type(value, __u32);
    __uint(max_entries, RING_SIZE);
};

struct {
    __uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
    __type(key, __u32);
    __uint(max_entries, MAX_SERVICES);
    __array(values, struct ring);
} rings SEC(".maps");

// Flows that have sent more than a SYN, and joins whose token was right.
struct {
    __uint(type, BPF_MAP_TYPE_LRU_HASH);
    __type(key, struct tuple);
    __type(value, struct flow);
    __uint(max_entries, 1 << 20);
} flows SEC(".maps");

// All others: a flood of SYNs pushes out of this table, and not out of `flows`.
struct {
    __uint(type, BPF_MAP_TYPE_LRU_HASH);
    __type(key, struct tuple);
    __type(value, struct flow);
    __uint(max_entries, 1 << 16);
} fresh SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_LRU_HASH);
    __type(key, struct token_key);
    __type(value, struct token);
    __uint(max_entries, 1 << 20);
} tokens SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_LRU_HASH);
    __type(key, struct fragment_key);
    __type(value, __u32);
    __uint(max_entries, 1 << 12);
} fragments SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
    __type(key, __u32);
    __type(value, struct traffic);
    __uint(max_entries, MAX_BACKENDS);
} traffic SEC(".maps");

// From whom a backend takes tunnelled packets.
struct {
    __uint(type, BPF_MAP_TYPE_HASH);
    __type(key, struct address);
    __type(value, __u32);
    __uint(max_entries, 64);
} tunnel_peers SEC(".maps");

// Events that belong to no backend. `COUNTERS` in `src/abi.rs` names them, in this order.
enum counter {
    TOKENS_LEARNED,
    TOKEN_COLLISIONS,
    FLOWS_ADDED,
    FLOWS_REMOVED,
    TOKENS_ADDED,
    ICMP_DELIVERED,
    FRAGMENTS_DELIVERED,
    PICKED_UP,           // packets without SYN of flows that nobody knows: they go by the ring
    JOIN_TOKEN_UNKNOWN,  // dropped: the client repeats its SYN
    NO_BACKEND,          // dropped
    MALFORMED_OPTIONS,   // the TCP options don't add up; served as plain TCP
    TRUNCATED,           // passed on to the kernel, with all that follow
    VLAN,
    IPV6_EXTENSION,
    FRAGMENT_UNKNOWN,
    ICMP_UNKNOWN,
    MPTCP_VERSION_0,       // served, but its joins cannot be steered
    FLOWS_TOLD,            // the control plane's, by its agents
    TOKENS_TOLD,
    FRESH_ADDED,
    FRESH_REMOVED,
    COUNTERS,
};

struct {
    __uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
    __type(key, __u32);
    __type(value, __u64);
    __uint(max_entries, COUNTERS);
} counters SEC(".maps");

static __always_inline void count(__u32 which)
{
    __u64 *counter = bpf_map_lookup_elem(&counters, &which);
    if (counter)
        *counter += 1;
}
