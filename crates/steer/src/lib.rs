//! Which path a live Multipath TCP connection takes, decided from outside the program that has it.

pub mod primary;
