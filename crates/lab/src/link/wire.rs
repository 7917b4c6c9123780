//! One direction of an emulated link in virtual time: which frames get lost, and when the others arrive.

use std::time::Duration;

use super::shape::{Shape, transmission_time};

/// What becomes of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Lost on the way, or no room in the queue.
    Drop,
    /// Reaches the other end at this time, on the clock of `now`.
    DeliverAt(Duration),
}

/// A sender's queue, a transmitter that takes one frame at a time, and the way to the other end.
#[derive(Debug)]
pub struct Wire {
    shape: Shape,
    random: fastrand::Rng,
    /// When the transmitter will have sent all that it accepted.
    idle_at: Duration,
    last_delivery: Duration,
}

impl Wire {
    /// The same `seed` loses the same frames.
    pub fn new(shape: &Shape, seed: u64) -> Self {
        Wire {
            shape: shape.clone(),
            random: fastrand::Rng::with_seed(seed),
            idle_at: Duration::ZERO,
            last_delivery: Duration::ZERO,
        }
    }

    /// For the frames to come; those on their way arrive as promised.
    pub fn set_shape(&mut self, shape: &Shape) {
        self.shape = shape.clone();
    }

    /// A frame of `len` bytes is given to the link at `now`, which never runs backwards.
    ///
    /// Like netem with tbf below it: a lost frame takes no time of the transmitter.
    pub fn on_frame(&mut self, now: Duration, len: usize) -> Verdict {
        if self.shape.loss.is_some_and(|loss| self.random.f64() < loss) {
            return Verdict::Drop;
        }
        let start = self.idle_at.max(now);
        let sent = match self.shape.rate {
            None => now,
            Some(_) if start - now > self.shape.queue_or_default() => return Verdict::Drop,
            Some(rate) => start + transmission_time(len as u64, rate),
        };
        self.idle_at = sent;
        self.last_delivery = self.last_delivery.max(sent + self.draw_delay());
        Verdict::DeliverAt(self.last_delivery)
    }

    fn draw_delay(&mut self) -> Duration {
        let delay = self.shape.delay.unwrap_or_default();
        match self.shape.jitter {
            None => delay,
            Some(jitter) => (delay + jitter.mul_f64(2.0 * self.random.f64())).saturating_sub(jitter),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// Shapes with every field given or not.
    fn shapes() -> impl Strategy<Value = Shape> {
        let rate = proptest::option::of(10_000u64..1_000_000_000);
        let loss = proptest::option::of(0.0..1.0f64);
        let (delay, jitter) = (proptest::option::of(0u64..200), proptest::option::of(0.0..=1.0));
        (rate, delay, jitter, loss, proptest::option::of(0u64..300)).prop_map(
            |(rate, delay, jitter, loss, queue)| {
                let delay = delay.map(|ms| ms as u32 * MS);
                let jitter = delay.zip(jitter).map(|(delay, share)| delay.mul_f64(share));
                Shape { rate, delay, jitter, loss, queue: rate.and(queue).map(|ms| ms as u32 * MS) }
            },
        )
    }

    /// Frames as (pause before it in µs, bytes).
    fn frames() -> impl Strategy<Value = Vec<(u64, usize)>> {
        proptest::collection::vec((prop_oneof![Just(0u64), 0u64..20_000], 60usize..1515), 1..300)
    }

    proptest! {
        #[test]
        fn no_frame_is_early_late_out_of_order_or_faster_than_the_rate(shape in shapes(), frames in frames()) {
            shape.check().unwrap();
            let mut wire = Wire::new(&shape, 1);
            let delay = shape.delay.unwrap_or_default();
            let jitter = shape.jitter.unwrap_or_default();
            let (mut now, mut last) = (Duration::ZERO, Duration::ZERO);
            // The earliest time at which the transmitter can be done with what it accepted.
            let mut bytes_end = Duration::ZERO;
            for (pause, len) in frames {
                now += Duration::from_micros(pause);
                let Verdict::DeliverAt(at) = wire.on_frame(now, len) else { continue };
                let own = shape.rate.map(|rate| transmission_time(len as u64, rate)).unwrap_or_default();
                bytes_end = bytes_end.max(now) + own;
                prop_assert!(at >= last, "out of order");
                prop_assert!(at + jitter >= bytes_end + delay, "faster than rate and delay");
                let latest = now + shape.queue_or_default() + own + delay + jitter;
                prop_assert!(at <= latest.max(last), "waited longer than the queue");
                last = at;
            }
        }

        #[test]
        fn an_idle_link_takes_every_frame(rate in 1u64..1_000_000_000, len in 60usize..65_536) {
            let shape = Shape { rate: Some(rate), queue: Some(Duration::ZERO), ..Shape::default() };
            let verdict = Wire::new(&shape, 1).on_frame(MS, len);
            prop_assert_eq!(verdict, Verdict::DeliverAt(MS + transmission_time(len as u64, rate)));
        }
    }

    #[test]
    fn the_share_of_lost_frames_is_within_four_sigma() {
        const FRAMES: u32 = 50_000;
        for (loss, seed) in
            [0.0, 0.001, 0.01, 0.1, 0.5, 1.0].into_iter().flat_map(|loss| [(loss, 1), (loss, 2)])
        {
            let mut wire = Wire::new(&Shape { loss: Some(loss), ..Shape::default() }, seed);
            let lost = (0..FRAMES).filter(|_| wire.on_frame(MS, 100) == Verdict::Drop).count() as f64;
            let sigma = (f64::from(FRAMES) * loss * (1.0 - loss)).sqrt();
            assert!((lost - f64::from(FRAMES) * loss).abs() <= 4.0 * sigma, "{lost} of {FRAMES} at {loss}");
        }
    }

    #[test]
    fn back_to_back_frames_leave_at_the_rate() {
        // 8 Mbit/s: a byte each microsecond.
        let shape = Shape { rate: Some(8_000_000), delay: Some(20 * MS), ..Shape::default() };
        let mut wire = Wire::new(&shape, 1);
        for n in 1..=50 {
            assert_eq!(wire.on_frame(Duration::ZERO, 1000), Verdict::DeliverAt(20 * MS + n * MS));
        }
    }

    #[test]
    fn a_full_queue_drops_the_newest_and_takes_again_when_drained() {
        let shape = Shape { rate: Some(8_000_000), queue: Some(10 * MS), ..Shape::default() };
        let mut wire = Wire::new(&shape, 1);
        let accepted = (0..100).filter(|_| wire.on_frame(Duration::ZERO, 1000) != Verdict::Drop).count();
        // One in the transmitter and ten milliseconds of others.
        assert_eq!(accepted, 11);
        assert_eq!(wire.on_frame(MS, 1000), Verdict::DeliverAt(12 * MS));
    }

    #[test]
    fn jitter_spreads_over_its_whole_range() {
        let shape = Shape { delay: Some(20 * MS), jitter: Some(5 * MS), ..Shape::default() };
        let mut wire = Wire::new(&shape, 1);
        let delays: Vec<f64> = (0..2000)
            .map(|n| match wire.on_frame(n * 100 * MS, 100) {
                Verdict::DeliverAt(at) => (at - n * 100 * MS).as_secs_f64() * 1e3,
                Verdict::Drop => panic!("no loss asked for"),
            })
            .collect();
        let mean = delays.iter().sum::<f64>() / delays.len() as f64;
        assert!(delays.iter().all(|d| (15.0..=25.0).contains(d)));
        assert!(delays.iter().any(|d| *d < 15.2) && delays.iter().any(|d| *d > 24.8));
        // The deviation of a uniform distribution is 5/sqrt(3) ms, of the mean of 2000 draws 0.065 ms.
        assert!((mean - 20.0).abs() < 0.3, "{mean}");
    }

    #[test]
    fn a_new_shape_rules_the_next_frame_but_overtakes_none() {
        let slow = Shape { delay: Some(100 * MS), ..Shape::default() };
        let mut wire = Wire::new(&slow, 1);
        assert_eq!(wire.on_frame(Duration::ZERO, 100), Verdict::DeliverAt(100 * MS));
        wire.set_shape(&Shape { delay: Some(10 * MS), ..Shape::default() });
        assert_eq!(wire.on_frame(MS, 100), Verdict::DeliverAt(100 * MS));
        assert_eq!(wire.on_frame(95 * MS, 100), Verdict::DeliverAt(105 * MS));
    }
}
