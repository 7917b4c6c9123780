//! How many connections a service may have, in total and per client address.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex};

/// Counts the connections of one listener. The limits themselves are arguments, since a reload may change
/// them while connections live.
#[derive(Debug, Default)]
pub struct Limits {
    counts: Mutex<Counts>,
}

#[derive(Debug, Default)]
struct Counts {
    total: usize,
    per_source: HashMap<IpAddr, usize>,
}

/// A counted connection; dropping it gives the place back.
#[derive(Debug)]
pub struct Permit {
    limits: Arc<Limits>,
    source: Option<IpAddr>,
}

impl Limits {
    /// Counts one connection more, unless there are `max` already; 0 is no limit.
    pub fn admit(self: &Arc<Self>, max: usize) -> Option<Permit> {
        let mut counts = self.lock();
        if max != 0 && counts.total >= max {
            return None;
        }
        counts.total += 1;
        Some(Permit { limits: Arc::clone(self), source: None })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Counts> {
        self.counts.lock().expect("no code panics while it holds this lock")
    }
}

impl Permit {
    /// Counts the connection for `source` too, unless that has `max` already; 0 is no limit.
    ///
    /// Apart from [`Limits::admit`] since the source may come in a PROXY header.
    pub fn attribute(&mut self, source: IpAddr, max: usize) -> bool {
        let mut counts = self.limits.lock();
        let count = counts.per_source.entry(source).or_default();
        if max != 0 && *count >= max {
            return false;
        }
        *count += 1;
        self.source = Some(source);
        true
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut counts = self.limits.lock();
        counts.total -= 1;
        if let Some(source) = self.source
            && let Some(count) = counts.per_source.get_mut(&source)
        {
            *count -= 1;
            if *count == 0 {
                counts.per_source.remove(&source);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_come_back_and_leave_no_trace() {
        let limits = Arc::new(Limits::default());
        let source = "192.0.2.1".parse().unwrap();
        let mut first = limits.admit(2).unwrap();
        let mut second = limits.admit(2).unwrap();
        assert!(limits.admit(2).is_none());
        assert!(first.attribute(source, 1));
        assert!(!second.attribute(source, 1));
        assert!(second.attribute("192.0.2.2".parse().unwrap(), 1));
        drop(first);
        let mut third = limits.admit(2).unwrap();
        assert!(third.attribute(source, 1));
        drop((second, third));
        assert_eq!(limits.lock().total, 0);
        assert!(limits.lock().per_source.is_empty());
    }

    #[test]
    fn zero_is_no_limit() {
        let limits = Arc::new(Limits::default());
        let permits: Vec<_> = (0..100)
            .map(|_| {
                let mut permit = limits.admit(0).unwrap();
                assert!(permit.attribute("::1".parse().unwrap(), 0));
                permit
            })
            .collect();
        assert_eq!(limits.lock().total, permits.len());
    }
}
