//! Shaping by the kernel: tbf for the rate, netem for the rest, blackhole for silence.

use std::sync::OnceLock;

use mptcp::Netns;

use super::shape::{FULL_FRAME, Shape, transmission_time};
use super::{Error, Result, ip, tool};

/// Can this kernel alone give a link that shape?
pub fn can_do(shape: &Shape) -> Result<bool> {
    static TBF: OnceLock<bool> = OnceLock::new();
    static NETEM: OnceLock<bool> = OnceLock::new();
    let rate = shape.rate.is_none() || probe(&TBF, "tbf rate 1mbit burst 5000 latency 50ms")?;
    let rest = !shape.is_more_than_rate() || probe(&NETEM, "netem delay 1ms")?;
    Ok(rate && rest)
}

/// Replaces the queueing discipline of an interface.
pub fn set(netns: &Netns, ifname: &str, blackhole: bool, shape: &Shape) -> Result<()> {
    let stack = if blackhole { vec!["root blackhole".into()] } else { stack(shape) };
    // A kind of queueing discipline can be changed in place, a stack of them only as a whole.
    if kinds(&tool(netns, "tc", &format!("qdisc show dev {ifname}"))?) != kinds(&stack.join("\n")) {
        // Fails where only the default is there.
        let _ = tool(netns, "tc", &format!("qdisc del dev {ifname} root"));
    }
    for qdisc in stack {
        tool(netns, "tc", &format!("qdisc replace dev {ifname} {qdisc}"))?;
    }
    Ok(())
}

/// Frames that the root queueing discipline has dropped.
pub fn drops(netns: &Netns, ifname: &str) -> Result<u64> {
    let command = format!("-s -j qdisc show dev {ifname} root");
    let answer = tool(netns, "tc", &command)?;
    let qdiscs: serde_json::Value = serde_json::from_str(&answer).map_err(|e| Error::Tool {
        command: format!("tc {command}"),
        netns: netns.name().into(),
        says: e.to_string(),
    })?;
    Ok(qdiscs[0]["drops"].as_u64().unwrap_or(0))
}

fn probe(answer: &OnceLock<bool>, qdisc: &str) -> Result<bool> {
    if let Some(known) = answer.get() {
        return Ok(*known);
    }
    let sandbox = Netns::anonymous()?;
    ip(&sandbox, "link set lo up")?;
    let works = match tool(&sandbox, "tc", &format!("qdisc add dev lo root {qdisc}")) {
        Ok(_) => true,
        Err(Error::Tool { says, .. }) if says.contains("kind is unknown") => false,
        Err(error) => return Err(error),
    };
    Ok(*answer.get_or_init(|| works))
}

/// The queueing disciplines for a shape, root first, as `tc qdisc replace dev IF …` takes them.
fn stack(shape: &Shape) -> Vec<String> {
    let mut stack = Vec::new();
    if shape.is_more_than_rate() {
        let us = |duration: Option<std::time::Duration>| duration.unwrap_or_default().as_micros();
        let mut netem = format!("root handle 1: netem limit 100000 delay {}us", us(shape.delay));
        if shape.jitter.is_some() {
            // Given a rate, netem sends no frame before the one ahead of it; this rate is as good as none.
            netem += &format!(" {}us rate 1000gbit", us(shape.jitter));
        }
        if let Some(loss) = shape.loss {
            netem += &format!(" loss {:.6}%", loss * 100.0);
        }
        stack.push(netem);
    }
    if let Some(rate) = shape.rate {
        let place = if stack.is_empty() { "root" } else { "parent 1: handle 2:" };
        // The bucket holds two full frames, or what 2 ms bring: a small one keeps tbf's bursts short.
        let burst = (rate / 8 / 500).max(2 * FULL_FRAME);
        let wait = shape.queue_or_default().max(transmission_time(FULL_FRAME, rate));
        stack.push(format!("{place} tbf rate {rate}bit burst {burst} latency {}us", wait.as_micros()));
    }
    stack
}

/// The kinds among what `tc qdisc show` prints or [`stack`] makes.
fn kinds(lines: &str) -> Vec<&str> {
    lines.split_whitespace().filter(|word| ["tbf", "netem", "blackhole"].contains(word)).collect()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_shape_becomes_the_least_stack_that_does_it() {
        let ms = |n| Some(Duration::from_millis(n));
        let rate = Shape { rate: Some(30_000_000), ..Shape::default() };
        let all = Shape { delay: ms(20), jitter: ms(2), loss: Some(0.01), queue: ms(100), ..rate.clone() };
        let tbf = "tbf rate 30000000bit burst 7500 latency";
        assert_eq!(stack(&Shape::default()), Vec::<String>::new());
        assert_eq!(stack(&rate), [format!("root {tbf} 50000us")]);
        assert_eq!(
            stack(&all),
            [
                "root handle 1: netem limit 100000 delay 20000us 2000us rate 1000gbit loss 1.000000%"
                    .to_string(),
                format!("parent 1: handle 2: {tbf} 100000us")
            ]
        );
    }
}
