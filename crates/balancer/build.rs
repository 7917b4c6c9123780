//! Compiles the BPF programs in `bpf/` with clang.

use std::path::Path;
use std::process::{Command, exit};
use std::{env, fs};

/// Object, source, and how it is compiled.
const OBJECTS: [(&str, &str, &[&str]); 4] =
    [("lb", "lb", &[]), ("lb-xdp", "lb", &["-DXDP"]), ("inspect", "inspect", &[]), ("flood", "flood", &[])];

fn main() {
    println!("cargo::rerun-if-changed=bpf");
    println!("cargo::rerun-if-env-changed=CLANG");
    let clang = env::var("CLANG").unwrap_or_else(|_| "clang".into());
    // Debian keeps the kernel's asm/ headers in a directory of the machine's own, which -target bpf doesn't know.
    let machine = format!("/usr/include/{}-linux-gnu", env::var("CARGO_CFG_TARGET_ARCH").unwrap());
    for (object, program, options) in OBJECTS {
        let object = Path::new(&env::var("OUT_DIR").unwrap()).join(format!("{object}.bpf.o"));
        let output = Command::new(&clang)
            .args(["-O2", "-g", "-Wall", "-Werror", "-target", "bpf", "-mcpu=v3", "-I", &machine, "-c"])
            .args(options)
            .args([Path::new(&format!("bpf/{program}.bpf.c")), Path::new("-o"), &object])
            .output();
        match output {
            Ok(output) if output.status.success() => {}
            Ok(output) => {
                let says = String::from_utf8_lossy(&output.stderr);
                if says.contains("bpf/bpf_helpers.h") {
                    fail(
                        "the load balancer's BPF programs need libbpf's headers: apt-get install libbpf-dev",
                    );
                }
                if says.contains("linux/bpf.h") || says.contains("asm/types.h") {
                    fail(
                        "the load balancer's BPF programs need the kernel's headers: apt-get install linux-libc-dev",
                    );
                }
                fail(&format!("bpf/{program}.bpf.c: {}", says.replace('\n', " ")));
            }
            Err(error) => fail(&format!(
                "the load balancer's BPF programs are built by {clang}, which does not start ({error}): apt-get \
                 install clang libbpf-dev"
            )),
        }
        assert!(fs::metadata(&object).is_ok_and(|object| object.len() > 0));
    }
}

fn fail(message: &str) -> ! {
    println!("cargo::error={message}");
    exit(1);
}
