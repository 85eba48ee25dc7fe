//! Orders and their states: numbered, done once, answered as often as asked. Pure.

use secondsite_control::api::{Order, OrderKind, OrderResult, OrderState};
use std::collections::BTreeMap;
use std::time::Duration;

/// A cut order that has no exact point after this long fails; a compare in between does not count.
pub const CUT_LIMIT: Duration = Duration::from_secs(240);
/// Exit code of "try later".
pub const EXIT_TRY_LATER: u8 = 75;
/// Exit code of "unavailable".
pub const EXIT_UNAVAILABLE: u8 = 69;

/// An order in work.
#[derive(Debug, Clone)]
pub struct Open {
    /// Its number.
    pub number: u64,
    /// What is to be done.
    pub what: OrderKind,
    /// When it came, and when it fails; none before it was first looked at.
    pub times: Option<(Duration, Duration)>,
    /// The newest point that would have done, had it been exact.
    pub fuzzy: Option<String>,
    /// It was handed on.
    pub begun: bool,
}

/// All orders that control does not know to be finished.
#[derive(Debug, Default)]
pub struct Orders {
    states: BTreeMap<u64, OrderState>,
    highest: u64,
    /// In work, rising by number.
    pub open: Vec<Open>,
}

impl Orders {
    /// Takes an order; one seen before is only answered again. True if it is new.
    pub fn take(&mut self, order: &Order) -> bool {
        if order.number <= self.highest {
            return false;
        }
        self.highest = order.number;
        let note = String::from("begun");
        self.states.insert(order.number, OrderState::Running { percent: 0, note });
        let Order { number, what } = *order;
        self.open.push(Open { number, what, times: None, fuzzy: None, begun: false });
        true
    }

    /// Control knows how these ended.
    pub fn forget(&mut self, up_to: u64) {
        let open = &self.open;
        self.states.retain(|number, _| *number > up_to || open.iter().any(|o| o.number == *number));
    }

    /// For the report.
    pub fn states(&self) -> BTreeMap<u64, OrderState> {
        self.states.clone()
    }

    /// How far an open order is; the percentage only grows, and 100 is for done.
    pub fn progress(&mut self, number: u64, percent: u8, note: &str) -> bool {
        let Some(OrderState::Running { percent: before, note: was }) = self.states.get_mut(&number)
        else {
            return false;
        };
        let percent = percent.clamp(*before, 99.max(*before));
        let changed = (*before, was.as_str()) != (percent, note);
        *before = percent;
        *was = note.into();
        changed
    }

    /// It is done.
    pub fn done(&mut self, number: u64, result: OrderResult) {
        self.open.retain(|open| open.number != number);
        self.states.insert(number, OrderState::Done { result });
    }

    /// It failed.
    pub fn failed(&mut self, number: u64, exit_code: u8, message: String) {
        self.open.retain(|open| open.number != number);
        self.states.insert(number, OrderState::Failed { exit_code, message });
    }
}

#[cfg(test)]
mod tests {
    use super::{Order, OrderKind, OrderResult, OrderState, Orders};

    #[test]
    fn an_order_is_done_once_and_progress_only_grows() {
        let mut orders = Orders::default();
        let order = Order { number: 7, what: OrderKind::Cut };
        assert!(orders.take(&order) && !orders.take(&order));
        assert!(orders.progress(7, 40, "a") && orders.progress(7, 10, "b"));
        assert_eq!(orders.states()[&7], OrderState::Running { percent: 40, note: "b".into() });
        orders.forget(7);
        assert_eq!(orders.states().len(), 1, "an open order is not forgotten");
        let result = OrderResult::Verify { volumes: Vec::new() };
        orders.done(7, result.clone());
        assert_eq!(orders.states()[&7], OrderState::Done { result });
        orders.forget(7);
        assert!(orders.states().is_empty() && !orders.take(&order) && orders.open.is_empty());
    }
}
