//! The agent's ledger of orders: pure bookkeeping, no I/O.
//!
//! Invariants: an order's final state is durable here before control hears it; it leaves the ledger
//! only when control has it, together with those of all orders before it. So after a crash a
//! finished order is answered again from here, and an unfinished one is done again.

use secondsite_control::api::{AgentReport, Order, OrderState};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// What must outlive the process.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Ledger {
    /// Control knows the final state of every order up to this number.
    known: u64,
    /// Final states that control may not know yet.
    finished: BTreeMap<u64, OrderState>,
}

/// All orders that this process has seen and control does not yet know to be finished.
#[derive(Debug)]
pub struct Orders {
    ledger: Ledger,
    open: BTreeSet<u64>,
}

impl Orders {
    /// Goes on where an earlier process stopped.
    pub fn new(ledger: Ledger) -> Self {
        Self { ledger, open: BTreeSet::new() }
    }

    /// To be written durably whenever [`Self::fold`] or [`Self::delivered`] changed it.
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// Orders above this one are asked for.
    pub fn seen(&self) -> u64 {
        self.open.last().copied().unwrap_or(0).max(self.ledger.known)
    }

    /// An order from control. Returns it if it is to be done now.
    pub fn receive(&mut self, order: Order) -> Option<Order> {
        let number = order.number;
        if number <= self.ledger.known || !self.open.insert(number) {
            return None;
        }
        (!self.ledger.finished.contains_key(&number)).then_some(order)
    }

    /// Takes final states from a report, and completes the report with those of earlier processes.
    /// True: the ledger changed and must be durable before the report is sent.
    pub fn fold(&mut self, report: &mut AgentReport) -> bool {
        let mut changed = false;
        report.orders.retain(|number, _| *number > self.ledger.known);
        for (number, state) in &report.orders {
            if is_final(state) && !self.ledger.finished.contains_key(number) {
                self.ledger.finished.insert(*number, state.clone());
                changed = true;
            }
        }
        for (number, state) in &self.ledger.finished {
            report.orders.insert(*number, state.clone());
        }
        changed
    }

    /// Control has taken these states. Returns the number up to which all may be forgotten, if it
    /// has risen; the ledger has changed then.
    pub fn delivered(&mut self, sent: &BTreeMap<u64, OrderState>) -> Option<u64> {
        let unknown: BTreeSet<u64> =
            self.open.iter().chain(self.ledger.finished.keys()).copied().collect();
        let done = |number: &&u64| sent.get(number).is_some_and(is_final);
        let up_to = *unknown.iter().take_while(done).last()?;
        self.ledger.known = up_to;
        self.ledger.finished.retain(|number, _| *number > up_to);
        self.open.retain(|number| *number > up_to);
        Some(up_to)
    }
}

fn is_final(state: &OrderState) -> bool {
    matches!(state, OrderState::Done { .. } | OrderState::Failed { .. })
}

#[cfg(test)]
mod tests {
    use super::Orders;
    use secondsite_control::api::{AgentReport, Order, OrderKind, OrderState};
    use std::collections::BTreeMap;

    fn order(number: u64) -> Order {
        Order { number, what: OrderKind::Cut }
    }

    fn failed() -> OrderState {
        OrderState::Failed { exit_code: 75, message: "later".into() }
    }

    fn report(orders: &[(u64, OrderState)]) -> AgentReport {
        AgentReport {
            agent_version: String::new(),
            volumes: Vec::new(),
            orders: orders.iter().cloned().collect::<BTreeMap<_, _>>(),
            stopped: None,
        }
    }

    #[test]
    fn a_finished_order_is_answered_again_and_not_done_again() {
        let mut orders = Orders::new(Default::default());
        assert!(orders.receive(order(4)).is_some());
        assert!(orders.receive(order(7)).is_some());
        assert!(orders.receive(order(4)).is_none(), "in work already");
        assert_eq!(orders.seen(), 7);
        let mut first =
            report(&[(4, OrderState::Running { percent: 1, note: String::new() }), (7, failed())]);
        assert!(orders.fold(&mut first), "7 is final: durable before it is sent");
        assert!(!orders.fold(&mut first), "and only once");
        assert_eq!(orders.delivered(&first.orders), None, "4 is not finished, so 7 stays");

        // The process dies; control may or may not have heard of 7.
        let mut orders = Orders::new(orders.ledger().clone());
        assert_eq!(orders.seen(), 0);
        assert!(orders.receive(order(4)).is_some(), "4 was not finished: done again");
        assert!(orders.receive(order(7)).is_none(), "7 was");
        let mut second = report(&[(4, failed())]);
        assert!(orders.fold(&mut second));
        assert!(second.orders.contains_key(&7));
        assert_eq!(orders.delivered(&second.orders), Some(7));
        assert_eq!(orders.seen(), 7);
        assert!(orders.receive(order(7)).is_none());
        let mut third = report(&[(4, failed())]);
        assert!(!orders.fold(&mut third));
        assert!(third.orders.is_empty(), "what control knows is not said again");
    }
}
