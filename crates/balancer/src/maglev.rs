//! Maglev hashing (Eisenbud et al., NSDI 2016, section 3.4): a ring of places, each with one backend.
//!
//! Each backend has its own order of preference over all places, from its name alone; in turns each takes the
//! first place of its order that is still free. So balancers that know the same backends make the same ring, and
//! when one backend leaves, few places of the others change hands.

/// Gives each of `size` places (a prime) to one of `backends`, by name and weight; a backend of weight 2 gets twice
/// as many places as one of weight 1. The answer holds indices of `backends`; it is empty where no backend has a weight.
pub fn ring(size: u32, backends: &[(&str, u32)]) -> Vec<usize> {
    let heaviest = backends.iter().map(|(_, weight)| *weight).max().unwrap_or(0);
    if heaviest == 0 {
        return Vec::new();
    }
    // In an order that does not depend on the file's.
    let mut order: Vec<usize> = (0..backends.len()).filter(|index| backends[*index].1 > 0).collect();
    order.sort_by_key(|index| backends[*index].0);
    let mut turns: Vec<Turn> = order
        .into_iter()
        .map(|index| {
            let (name, weight) = backends[index];
            let place = hash(name, 1) % u64::from(size);
            let skip = hash(name, 2) % u64::from(size - 1) + 1;
            Turn { index, weight: u64::from(weight), credit: 0, place, skip }
        })
        .collect();

    let mut ring = vec![usize::MAX; size as usize];
    let mut free = ring.len();
    loop {
        for turn in &mut turns {
            turn.credit += turn.weight;
            if turn.credit < u64::from(heaviest) {
                continue;
            }
            turn.credit -= u64::from(heaviest);
            // The order visits every place, since the size is prime; some place is free.
            while ring[turn.place as usize] != usize::MAX {
                turn.place = (turn.place + turn.skip) % u64::from(size);
            }
            ring[turn.place as usize] = turn.index;
            free -= 1;
            if free == 0 {
                return ring;
            }
        }
    }
}

struct Turn {
    index: usize,
    weight: u64,
    credit: u64,
    place: u64,
    skip: u64,
}

/// The same on every machine and in every version: FNV-1a, stirred.
fn hash(name: &str, which: u64) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325 ^ which;
    for byte in name.bytes() {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    }
    hash = (hash ^ hash >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    hash = (hash ^ hash >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    hash ^ hash >> 31
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::abi::RING_SIZE;

    fn count(ring: &[usize], index: usize) -> usize {
        ring.iter().filter(|owner| **owner == index).count()
    }

    #[test]
    fn every_backend_gets_its_share() {
        for backends in [2, 7, 100] {
            let names: Vec<String> = (0..backends).map(|n| format!("app-{n}")).collect();
            let list: Vec<(&str, u32)> = names.iter().map(|name| (name.as_str(), 1)).collect();
            let ring = ring(RING_SIZE, &list);
            let fair = ring.len() / backends;
            assert!((0..backends).all(|index| count(&ring, index).abs_diff(fair) <= 1));
        }
    }

    #[test]
    fn weights_are_shares() {
        let ring = ring(RING_SIZE, &[("a", 1), ("b", 3), ("c", 0)]);
        assert_eq!(count(&ring, 2), 0);
        assert!(count(&ring, 1).abs_diff(3 * count(&ring, 0)) <= 4, "{}", count(&ring, 0));
    }

    #[test]
    fn the_order_of_the_file_does_not_matter() {
        let one = ring(RING_SIZE, &[("a", 1), ("b", 1), ("c", 2)]);
        let other = ring(RING_SIZE, &[("c", 2), ("a", 1), ("b", 1)]);
        let renamed: Vec<usize> = other.iter().map(|index| [2, 0, 1][*index]).collect();
        assert_eq!(one, renamed);
    }

    #[test]
    fn few_places_change_hands_when_a_backend_leaves() {
        let names: Vec<String> = (0..7).map(|n| format!("app-{n}")).collect();
        let list: Vec<(&str, u32)> = names.iter().map(|name| (name.as_str(), 1)).collect();
        let (all, without) = (ring(RING_SIZE, &list), ring(RING_SIZE, &list[..6]));
        let moved = all.iter().zip(&without).filter(|(a, b)| **a != 6 && a != b).count();
        assert!(moved < all.len() / 20, "{moved}");
    }

    #[test]
    fn nobody_is_on_the_ring_of_no_backends() {
        assert!(ring(RING_SIZE, &[]).is_empty());
        assert!(ring(RING_SIZE, &[("a", 0)]).is_empty());
    }
}
