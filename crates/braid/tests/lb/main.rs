//! `braid lb` in real networks: real clients, real joins, real backends. BPF needs root of the machine, not of a user
//! namespace: without it each test says so and passes.

mod ecmp;
mod lifecycle;
mod net;
mod rebuild;
mod steering;
mod tunnel;
mod xdp;
