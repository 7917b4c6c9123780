//! Sends one line to an echo server and prints the answer and the paths: `dialer server.example:7000 hello`.
#![allow(clippy::print_stdout)] // what it prints is what it is for

use std::error::Error;

use mptcp::info::{self, Status};
use mptcp::socket::{self, Options};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let (Some(server), Some(line)) = (args.next(), args.next()) else {
        return Err("usage: dialer HOST:PORT LINE".into());
    };
    let mut stream = socket::dial(&server, &Options::default()).await?;
    stream.write_all(format!("{line}\n").as_bytes()).await?;
    let mut answer = String::new();
    BufReader::new(&mut stream).read_line(&mut answer).await?;
    print!("{answer}");

    match info::of(&stream)? {
        Status::Mptcp(info) => println!("mptcp, {} bytes sent", info.bytes_sent),
        Status::Fallback(_) => println!("fell back to tcp"),
        Status::Tcp => println!("tcp"),
    }
    for subflow in info::subflows(&stream)? {
        println!("{} to {}: rtt {} us", subflow.local, subflow.remote, subflow.tcp.rtt_us);
    }
    Ok(())
}
