//! The link of an agent or a target to control: one thread, one runtime, four loops.
//!
//! It asks for newer assignments and orders, sends reports, and renews the certificate from a third
//! of its life on. Nothing here is needed for replication to go on: when control is away the link
//! says so and tries again, with a growing, jittered pause. What came from control is durable
//! before it is applied.

use crate::pulse;
use secondsite_control::api::RenewRequest;
use secondsite_control::client::Client;
use secondsite_control::client_error::ClientError;
use secondsite_control::pki::{self, Identity};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep, sleep_until, timeout};

/// How long one question to control may stay unanswered, seconds.
pub const POLL_SECONDS: u64 = 20;
/// A report is sent at least this often.
const REPORT_EVERY: Duration = Duration::from_secs(5);
/// And at most this often.
const REPORT_GAP: Duration = Duration::from_millis(500);
/// How often [`Side::tend`] is called.
const TEND_EVERY: Duration = Duration::from_secs(30);
/// Pause after the first failure; it doubles up to [`PAUSE_MAX`].
const PAUSE_MIN: Duration = Duration::from_millis(500);
/// Longest pause between two attempts.
const PAUSE_MAX: Duration = Duration::from_secs(15);
/// How often the thread shows that it goes round.
const BEAT_EVERY: Duration = Duration::from_secs(1);
/// How often the certificate is looked at, at least and at most.
const RENEWAL_LOOK_MIN: Duration = Duration::from_secs(1);
const RENEWAL_LOOK_MAX: Duration = Duration::from_secs(60);

/// Why a step of the link failed.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// Control is away, or refused.
    #[error("{0}")]
    Control(#[from] ClientError),
    /// State could not be kept.
    #[error("{0}")]
    State(#[from] crate::cli::failure::Failure),
    /// The devices of this host could not be listed.
    #[error("{0}")]
    Inventory(#[from] crate::inventory::InventoryError),
    /// A new key or certificate could not be used.
    #[error("{0:#}")]
    Certificate(anyhow::Error),
}

/// What differs between an agent and a target.
pub trait Side: Send + Sync + 'static {
    /// The name of the role's key and certificate files, and of the daemon.
    const ROLE: &'static str;
    /// Asks once for what is newer than what is known, and applies it.
    fn poll(&self, client: &Client) -> impl Future<Output = Result<(), LinkError>>;
    /// Sends one report.
    fn report(&self, client: &Client) -> impl Future<Output = Result<(), LinkError>>;
    /// What else is due every [`TEND_EVERY`].
    fn tend(&self, client: &Client) -> impl Future<Output = Result<(), LinkError>>;
    /// Whether the certificate may be renewed (not on another machine).
    fn renews(&self) -> bool;
    /// A renewed certificate.
    fn set_identity(&self, identity: Arc<Identity>);
}

/// The running link.
pub struct Link {
    shared: Arc<Shared>,
    thread: JoinHandle<()>,
}

/// What the data plane's threads, the link's thread and the main thread share.
pub struct Shared {
    address: String,
    changed: Notify,
    stop: Notify,
    identity: Mutex<Arc<Identity>>,
    /// Shared by the loops, so that connections are kept; made anew with a new certificate.
    client: Mutex<Arc<Client>>,
    /// Why control does not answer; none while it does.
    trouble: Mutex<Option<String>>,
}

impl Shared {
    /// For a control server at `address`.
    pub fn new(address: String, identity: Arc<Identity>) -> anyhow::Result<Arc<Self>> {
        let client = Client::new(&address, identity.client_config()?);
        Ok(Arc::new(Self {
            client: Mutex::new(Arc::new(client)),
            address,
            changed: Notify::new(),
            stop: Notify::new(),
            identity: Mutex::new(identity),
            trouble: Mutex::new(None),
        }))
    }

    /// The report changed. May be called from any thread.
    pub fn changed(&self) {
        self.changed.notify_one();
    }

    /// How the link is, for the status line.
    pub fn status(&self) -> String {
        match &*lock(&self.trouble) {
            None => "control answers".into(),
            Some(why) => format!("control is away ({why})"),
        }
    }

    /// Whether control answered the last question.
    pub fn control_answers(&self) -> bool {
        lock(&self.trouble).is_none()
    }

    /// When our certificate ends.
    pub fn certificate_ends(&self) -> jiff::Timestamp {
        self.identity().not_after()
    }

    fn client(&self) -> Arc<Client> {
        Arc::clone(&lock(&self.client))
    }

    fn identity(&self) -> Arc<Identity> {
        Arc::clone(&lock(&self.identity))
    }

    /// Logs when control goes and when it comes back, not each attempt.
    fn note(&self, role: &str, result: Result<&(), &LinkError>) {
        let mut trouble = lock(&self.trouble);
        match result {
            Ok(_) => {
                if trouble.take().is_some() {
                    tracing::info!("control at {} answers again", self.address);
                }
            }
            Err(error) => {
                let why = self.expiry(role).unwrap_or_else(|| error.to_string());
                if trouble.as_ref() != Some(&why) {
                    tracing::warn!("{why}; the last assignment goes on, tried again");
                    *trouble = Some(why);
                }
            }
        }
    }

    /// What to say if our certificate has ended.
    fn expiry(&self, role: &str) -> Option<String> {
        let ends = self.identity().not_after();
        (ends <= jiff::Timestamp::now()).then(|| {
            let remedy = match role {
                "agent" => "type on control's host: secondsite token; here: secondsite join",
                _ => "type here: secondsite setup with the same --store",
            };
            format!("the {role}'s certificate ended {ends}; {remedy}")
        })
    }
}

impl Link {
    /// Starts the thread.
    pub fn start<S: Side>(side: Arc<S>, shared: Arc<Shared>) -> std::io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let running = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name("control-link".into()).spawn(move || {
            let _joined = pulse::join("the link to control");
            runtime.block_on(async {
                tokio::select! {
                    () = running.stop.notified() => {}
                    () = polls(&*side, &running) => {}
                    () = reports(&*side, &running) => {}
                    () = renewals(&*side, &running) => {}
                    () = tending(&*side, &running) => {}
                    () = beating() => {}
                }
            });
        })?;
        Ok(Self { shared, thread })
    }

    /// Ends the thread; a question under way is dropped.
    pub fn stop(self) {
        self.shared.stop.notify_one();
        if self.thread.join().is_err() {
            tracing::error!("the link to control had panicked");
        }
    }
}

/// Shows that this thread still goes from one loop to the next.
async fn beating() {
    loop {
        pulse::beat_again_in(BEAT_EVERY);
        sleep(BEAT_EVERY).await;
    }
}

async fn polls<S: Side>(side: &S, shared: &Shared) {
    let mut pause = Pause::default();
    loop {
        let began = Instant::now();
        let result = side.poll(&shared.client()).await;
        shared.note(S::ROLE, result.as_ref());
        match result {
            Ok(()) => pause.reset(),
            Err(_) => sleep(pause.next(began)).await,
        }
    }
}

async fn reports<S: Side>(side: &S, shared: &Shared) {
    let mut pause = Pause::default();
    loop {
        let began = Instant::now();
        let result = side.report(&shared.client()).await;
        // The polling loop tells that control is away; a report hears sooner that it is back, since
        // a poll is answered only when there is news.
        match result {
            Ok(()) => {
                shared.note(S::ROLE, Ok(&()));
                pause.reset();
            }
            Err(error) => {
                if matches!(&error, LinkError::State(_)) {
                    tracing::error!("{error}");
                } else {
                    tracing::debug!("report: {error}");
                }
                sleep(pause.next(began)).await;
                continue;
            }
        }
        sleep_until(began + REPORT_GAP).await;
        // Elapsed or notified: both are reasons to report.
        let _ =
            timeout(REPORT_EVERY.saturating_sub(began.elapsed()), shared.changed.notified()).await;
    }
}

async fn tending<S: Side>(side: &S, shared: &Shared) {
    let mut pause = Pause::default();
    loop {
        let began = Instant::now();
        let result = side.tend(&shared.client()).await;
        match result {
            Ok(()) => {
                pause.reset();
                sleep(TEND_EVERY).await;
            }
            Err(error) => {
                match &error {
                    LinkError::Inventory(error) => tracing::warn!("{error}"),
                    error => tracing::debug!("inventory: {error}"),
                }
                sleep(pause.next(began)).await;
            }
        }
    }
}

async fn renewals<S: Side>(side: &S, shared: &Shared) {
    let mut pause = Pause::default();
    loop {
        let identity = shared.identity();
        // Another process may have made it anew (`join`, `setup`) because ours had ended.
        if let Ok(found) = Identity::load(&identity.dir, S::ROLE)
            && found.role == identity.role
            && found.serial() != identity.serial()
        {
            adopt(side, shared, Arc::new(found));
            sleep(RENEWAL_LOOK_MIN).await;
            continue;
        }
        let now = jiff::Timestamp::now();
        if !side.renews() || !identity.renewal_due(now) {
            let due = identity.not_before()
                + identity.not_after().duration_since(identity.not_before()) / 3;
            let left = Duration::try_from(due.duration_since(now)).unwrap_or(Duration::ZERO);
            sleep(left.clamp(RENEWAL_LOOK_MIN, RENEWAL_LOOK_MAX)).await;
            continue;
        }
        let began = Instant::now();
        match renew(shared, S::ROLE).await {
            Ok(renewed) => {
                pause.reset();
                adopt(side, shared, renewed);
            }
            Err(error) => {
                tracing::debug!("renewal: {error}");
                sleep(pause.next(began)).await;
            }
        }
    }
}

async fn renew(shared: &Shared, role: &str) -> Result<Arc<Identity>, LinkError> {
    renew_with(&shared.client(), &shared.identity(), role).await
}

/// The loops and the data plane use this one from now on.
fn adopt<S: Side>(side: &S, shared: &Shared, identity: Arc<Identity>) {
    match identity.client_config() {
        Ok(config) => {
            tracing::info!("certificate renewed, good until {}", identity.not_after());
            *lock(&shared.client) = Arc::new(Client::new(&shared.address, config));
            *lock(&shared.identity) = Arc::clone(&identity);
            side.set_identity(identity);
        }
        Err(error) => tracing::error!("the renewed certificate: {error:#}"),
    }
}

/// A fresh key and its certificate, put in place of `identity` (files `role.key`, `role.pem`).
pub async fn renew_with(
    client: &Client,
    identity: &Identity,
    role: &str,
) -> Result<Arc<Identity>, LinkError> {
    let (key_pem, request_pem) = pki::new_request().map_err(LinkError::Certificate)?;
    let reply = client.renew(&RenewRequest { request_pem }).await?;
    let install = || {
        pki::install(&identity.dir, role, &key_pem, &reply.certificate_pem, &reply.authority_pem)
            .and_then(|()| Identity::load(&identity.dir, role))
    };
    pulse::outside(install).map(Arc::new).map_err(LinkError::Certificate)
}

/// Growing pauses with jitter, so that a thousand agents do not come back at one instant.
#[derive(Debug, Default)]
struct Pause {
    failures: u32,
}

impl Pause {
    fn reset(&mut self) {
        self.failures = 0;
    }

    /// The pause after one more failure, less the time that the attempt itself took.
    fn next(&mut self, began: Instant) -> Duration {
        let whole = PAUSE_MIN.saturating_mul(1 << self.failures.min(8)).min(PAUSE_MAX);
        self.failures += 1;
        let jittered = whole / 2 + whole.mul_f64(f64::from(random_byte()) / 512.0);
        jittered.saturating_sub(began.elapsed()).max(PAUSE_MIN / 2)
    }
}

fn random_byte() -> u8 {
    let mut byte = [0];
    // Without randomness there is no jitter, which is no reason to stop.
    let _ = getrandom::fill(&mut byte);
    byte[0]
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::{PAUSE_MAX, PAUSE_MIN, Pause};
    use tokio::time::Instant;

    #[test]
    fn pauses_grow_to_a_bound() {
        let mut pause = Pause::default();
        let first = pause.next(Instant::now());
        assert!(first >= PAUSE_MIN / 2 - PAUSE_MIN / 8 && first <= PAUSE_MIN);
        let last = (0..40).map(|_| pause.next(Instant::now())).last().unwrap();
        assert!(last > PAUSE_MAX / 3 && last <= PAUSE_MAX, "{last:?}");
        pause.reset();
        assert!(pause.next(Instant::now()) <= PAUSE_MIN);
    }
}
