//! Which of a device's queues is served next, where several wait for one and the same thing: each in its turn, one turn at a
//! time, also after what they all waited for has come.
//!
//! Knows no requests: the device says which queues were kicked and what came of a turn. What one queue waits for, the
//! others wait for too, or a small request of one could be let past a large one of another for ever.

use std::collections::VecDeque;

/// Queues that have something to do, each once, the next one first.
#[derive(Debug, Default)]
pub struct Turns(VecDeque<u16>);

/// What came of a queue's turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// It has nothing more to do, or will be kicked again.
    Over,
    /// It has had a part of what it wanted, and waits.
    Partly,
    /// It has had nothing, and waits.
    Waits,
}

impl Turns {
    /// This queue was kicked.
    pub fn kicked(&mut self, queue: u16) {
        if !self.0.contains(&queue) {
            self.0.push_back(queue);
        }
    }

    /// The queue whose turn it is.
    pub fn next(&self) -> Option<u16> {
        self.0.front().copied()
    }

    /// The next queue takes its turn. One that has had something gets in line again behind the others; one that has had
    /// nothing keeps its place.
    pub fn take(&mut self, turn: impl FnOnce(u16) -> Turn) {
        let Some(queue) = self.0.pop_front() else { return };
        match turn(queue) {
            Turn::Over => {}
            Turn::Partly => self.0.push_back(queue),
            Turn::Waits => self.0.push_front(queue),
        }
    }

    /// Nothing is to be done any more.
    pub fn clear(&mut self) {
        self.0.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Gives each turn so much, until nobody wants anything: who was served, in order.
    fn served(mut wants: Vec<u32>, quantum: u32) -> Vec<u16> {
        let mut turns = Turns::default();
        (0..).zip(&wants).for_each(|(queue, _)| turns.kicked(queue));
        let mut order = Vec::new();
        while turns.next().is_some() {
            turns.take(|queue| {
                order.push(queue);
                let left = &mut wants[usize::from(queue)];
                *left = left.saturating_sub(quantum);
                if *left == 0 { Turn::Over } else { Turn::Partly }
            });
        }
        order
    }

    #[test]
    fn queues_take_turns_until_each_has_what_it_wants() {
        assert_eq!(served(vec![5, 1, 3], 2), [0, 1, 2, 0, 2, 0]);
    }

    #[test]
    fn one_that_got_nothing_is_the_next_and_one_that_was_kicked_twice_has_one_turn() {
        let mut turns = Turns::default();
        for queue in [3, 1, 3] {
            turns.kicked(queue);
        }
        turns.take(|_| Turn::Waits);
        assert_eq!(turns.next(), Some(3));
        turns.take(|_| Turn::Partly);
        turns.take(|queue| if queue == 1 { Turn::Over } else { Turn::Waits });
        assert_eq!(turns.next(), Some(3));
        turns.take(|_| Turn::Over);
        assert_eq!(turns.next(), None);
        turns.take(|_| unreachable!());
    }
}
