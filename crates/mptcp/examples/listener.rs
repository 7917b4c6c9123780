//! An echo server for MPTCP and TCP clients: `listener [::]:7000`.
#![allow(clippy::print_stdout)] // what it prints is what it is for

use std::error::Error;

use mptcp::info;
use mptcp::socket::{self, Options};
use tokio::net::TcpStream;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let addr = std::env::args().nth(1).ok_or("usage: listener ADDRESS:PORT")?;
    let listener = socket::listen(addr.parse()?, &Options::default())?;
    println!("listening on {}", listener.local_addr()?);
    loop {
        let (stream, peer) = listener.accept().await?;
        tokio::spawn(async move {
            match echo(stream).await {
                Ok(summary) => println!("{peer} {summary}"),
                Err(error) => println!("{peer} {error}"),
            }
        });
    }
}

async fn echo(mut stream: TcpStream) -> Result<String, Box<dyn Error + Send + Sync>> {
    let mptcp = info::of(&stream)?.is_mptcp();
    let (mut reader, mut writer) = stream.split();
    let bytes = tokio::io::copy(&mut reader, &mut writer).await?;
    Ok(format!("with mptcp: {mptcp}, {bytes} bytes"))
}
